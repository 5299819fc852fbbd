//! What many who watch cost the database, and how soon they are told to go.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use tasker_api::auth::keys;
use tasker_api::auth::{self, Role};
use tokio::task::JoinSet;

use crate::harness::{World, order, send};

const VIEWERS: usize = 200;

/// Moves a task, as an orchestrator and its people would, and leaves it as it was.
const MOVE: &str = "insert into tasker.transitions (task_uuid, entity_uuid, version, generation, from_state, to_state, event, began_at, at)
  select task_uuid, task_uuid, $2, 1, 'steps_in_process', 'suspended', 'Suspend', clock_timestamp(), clock_timestamp()
  from tasker.tasks where task_uuid = $1";

/// How often each statement of this database has run so far, but for those of the test itself.
async fn statements(world: &World) -> HashMap<String, i64> {
    let rows: Vec<(String, i64)> = sqlx::query_as(
        "select regexp_replace(s.query, '\\s+', ' ', 'g'), sum(s.calls)::bigint
         from pg_stat_statements s join pg_database d on d.oid = s.dbid
         where d.datname = current_database() and s.toplevel and s.query not like '%pg_stat_statements%'
           and s.query not like '%submit_task%' and s.query not like 'insert into tasker.transitions%'
         group by 1",
    )
    .fetch_all(world.pool())
    .await
    .unwrap();
    rows.into_iter().collect()
}

/// What a browser does with a page: it listens, and reads the page anew when something changed, but
/// no more often than the page says.
async fn watch(world: Arc<World>, cookie: String, page: String, seen: Arc<Seen>) {
    let get = async |path: &str| {
        let answer = send(world.request(Method::GET, path).header("cookie", &cookie)).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.body
    };
    let first = get(&page).await;
    let events =
        first.split("data-events=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a page that listens");
    let timeline = first.split("data-source=\"").nth(1).and_then(|rest| rest.split('"').next()).map(str::to_owned);
    let mut stream = world.request(Method::GET, events).header("cookie", &cookie).send().await.expect("events");
    assert_eq!(stream.status(), 200);
    seen.listening.fetch_add(1, Ordering::Relaxed);
    while let Ok(Some(_)) = stream.chunk().await {
        if seen.over.load(Ordering::Relaxed) {
            break;
        }
        let body = get(&page).await;
        if let Some(timeline) = &timeline {
            get(timeline).await;
        }
        seen.looks.fetch_add(1, Ordering::Relaxed);
        let crowded = body.contains("data-every=\"2000\"");
        tokio::time::sleep(Duration::from_millis(if crowded { 2_000 } else { 1_000 })).await;
    }
    seen.ended.fetch_add(1, Ordering::Relaxed);
}

#[derive(Default)]
struct Seen {
    listening: AtomicUsize,
    looks: AtomicUsize,
    ended: AtomicUsize,
    over: AtomicBool,
}

async fn until(what: &AtomicUsize, count: usize) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while what.load(Ordering::Relaxed) < count {
        assert!(Instant::now() < deadline, "{} of {count}", what.load(Ordering::Relaxed));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_viewers_cost_the_database_less_than_five_statements_a_second() {
    let world = World::start().await;
    if sqlx::query("create extension pg_stat_statements").execute(world.pool()).await.is_err() {
        eprintln!("skipped: this PostgreSQL does not count statements");
        return;
    }
    world.register(&order("shop")).await;
    let key = world.key(Role::Operator).await;
    let task = world.submit("shop", "watched").await;
    let mut cookies = Vec::new();
    for _ in 0..VIEWERS {
        cookies.push(world.session(&key).await);
    }
    // A step, so that its page has a timeline.
    sqlx::query(
        "insert into tasker.steps (step_uuid, task_uuid, step_index, queue, state, remaining_dependencies, last_at)
         select gen_random_uuid(), task_uuid, 0, 'worker_shop', 'pending', 0, clock_timestamp() from tasker.tasks",
    )
    .execute(world.pool())
    .await
    .unwrap();
    let mut version = 1;
    let world = Arc::new(world);
    for page in ["/".to_owned(), format!("/tasks/{task}")] {
        let seen = Arc::new(Seen::default());
        let mut viewers = JoinSet::new();
        for cookie in &cookies {
            viewers.spawn(watch(Arc::clone(&world), cookie.clone(), page.clone(), Arc::clone(&seen)));
        }
        until(&seen.listening, VIEWERS).await;
        let (before, looks, began) = (statements(&world).await, seen.looks.load(Ordering::Relaxed), Instant::now());
        let mut number = 0;
        let looked = || seen.looks.load(Ordering::Relaxed) - looks;
        // Until everybody has looked, however slow the machine is.
        while began.elapsed() < Duration::from_secs(10)
            || (looked() <= VIEWERS && began.elapsed() < Duration::from_mins(1))
        {
            // Something moves all the time; on the page of a task it is that task.
            number += 1;
            sqlx::query(
                "select tasker.submit_task('shop', 'order', input => '{\"order_id\": \"1\"}', correlation_id => $1)",
            )
            .bind(format!("more {number}"))
            .execute(world.pool())
            .await
            .unwrap();
            sqlx::query(MOVE).bind(task).bind(version).execute(world.pool()).await.unwrap();
            version += 1;
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        let s = began.elapsed().as_secs_f64();
        let mut asked: Vec<(i64, String)> = statements(&world)
            .await
            .into_iter()
            .map(|(text, count)| (count - before.get(&text).unwrap_or(&0), text.chars().take(100).collect()))
            .filter(|(count, _)| *count > 0)
            .collect();
        asked.sort_unstable_by(|a, b| b.cmp(a));
        let all: i64 = asked.iter().map(|(count, _)| count).sum();
        let looks = looked();
        let rate = f64::from(i32::try_from(all).unwrap()) / s;
        eprintln!("{VIEWERS} viewers of {page}: {rate:.2} statements/s, {looks} looks in {s:.1} s");
        assert!(rate < 5.0, "{page}: {rate:.2} statements/s: {asked:#?}");
        assert!(looks > VIEWERS, "they watch: {looks} looks");
        seen.over.store(true, Ordering::Relaxed);
        world.submit("shop", "the last").await;
        while let Some(ended) = viewers.join_next().await {
            ended.unwrap();
        }
    }
}

#[tokio::test]
async fn who_watches_with_a_session_is_told_to_go_when_it_ends() {
    let world = World::start().await;
    let key = world.key(Role::Viewer).await;
    let id = key.split('_').nth(1).unwrap();
    let (one, other) = (world.session(&key).await, world.session(&key).await);
    let listen = async |cookie: &str| {
        let mut stream = world.request(Method::GET, "/v1/events").header("cookie", cookie).send().await.unwrap();
        stream.chunk().await.unwrap().expect("it begins with a greeting");
        stream
    };
    let (mut first, mut second) = (listen(&one).await, listen(&other).await);
    let csrf = auth::csrf_of(one.split_once('=').unwrap().1);
    let out = world
        .request(Method::POST, "/logout")
        .header("cookie", &one)
        .header("content-type", "application/x-www-form-urlencoded")
        .body(format!("csrf={csrf}"));
    assert_eq!(send(out).await.status, 303);
    let ends = async |stream: &mut reqwest::Response| {
        let end = async { while matches!(stream.chunk().await, Ok(Some(_))) {} };
        tokio::time::timeout(Duration::from_secs(20), end).await
    };
    ends(&mut first).await.expect("a session that was signed out hears no more");
    assert_eq!(send(world.request(Method::GET, "/v1/tasks").header("cookie", &other)).await.status, 200);
    keys::revoke(&mut world.pool().acquire().await.unwrap(), id, "the test").await.unwrap();
    ends(&mut second).await.expect("a session of a key that was revoked hears no more");
}
