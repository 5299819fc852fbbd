//! Retention removes what is past its time, all of it, and nothing else.

use std::time::Duration;

use serde_json::Value;
use sqlx::AssertSqlSafe;
use tasker_orchestration::retention::{self, Removed};
use tasker_shared::client::Client;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

/// Every table with rows of tasks, and every row that must be gone with its task.
const TABLES: [&str; 5] = ["tasks", "steps", "attempts", "transitions", "idempotency_keys"];

/// The namespace of the tests keeps what has ended for a week.
pub async fn keep_a_week(world: &World, archive: bool) {
    let client = Client::connect(&world.url).await.expect("a client");
    let week = Duration::from_hours(7 * 24);
    client.set_retention("tests", Some(week), Some(week), archive, Some("ada")).await.expect("set");
}

/// As if these tasks had been submitted, and had ended, that many days ago: their uuids say when.
pub async fn age(world: &World, tasks: &[Uuid], days: i32) -> Vec<Uuid> {
    let mut aged = Vec::new();
    for task in tasks {
        let new: Uuid = sqlx::query_scalar(
            "select encode(substring(uuid_send(tasker.uuid7_floor(clock_timestamp() - make_interval(days => $2))) from 1 for 6)
               || substring(uuid_send($1) from 7), 'hex')::uuid",
        )
        .bind(task)
        .bind(days)
        .fetch_one(&world.pool)
        .await
        .expect("a uuid");
        for table in TABLES {
            sqlx::query(AssertSqlSafe(format!("update tasker.{table} set task_uuid = $2 where task_uuid = $1")))
                .bind(task)
                .bind(new)
                .execute(&world.pool)
                .await
                .expect("aged");
        }
        sqlx::query(
            "update tasker.tasks set finished_at = finished_at - make_interval(days => $2) where task_uuid = $1",
        )
        .bind(new)
        .bind(days)
        .execute(&world.pool)
        .await
        .expect("aged");
        aged.push(new);
    }
    aged
}

/// A week of the log, days ago, has tables of its own.
async fn make_week(world: &World, days: i32) -> String {
    sqlx::query_scalar(AssertSqlSafe(
        "with w as (select date_trunc('week', (clock_timestamp() - make_interval(days => DAYS)) at time zone 'UTC') at time zone 'UTC' as monday)
         select to_char(monday at time zone 'UTC', '_YYYYMMDD') from w"
            .replace("DAYS", &days.to_string()),
    ))
    .fetch_one(&world.pool)
    .await
    .map(|suffix: String| suffix)
    .expect("a week")
}

async fn create_week(world: &World, days: i32) -> String {
    let suffix = make_week(world, days).await;
    for table in ["transitions", "attempts"] {
        sqlx::query(AssertSqlSafe(format!(
            "do $$ declare monday timestamptz := to_timestamp('{}', 'YYYYMMDD') at time zone 'UTC' at time zone 'UTC'; begin
               execute format('create table tasker.{table}{suffix} partition of tasker.{table} for values from (%L) to (%L)',
                 tasker.uuid7_floor(monday), tasker.uuid7_floor(monday + interval '7 days')); end $$",
            &suffix[1..]
        )))
        .execute(&world.pool)
        .await
        .expect("a week of the log");
    }
    suffix
}

async fn rows(world: &World, table: &str) -> i64 {
    sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from tasker.{table}")))
        .fetch_one(&world.pool)
        .await
        .expect("a count")
}

async fn pass(world: &World, archive: Option<&std::path::Path>) -> Removed {
    let stop = CancellationToken::new();
    let mut removed = retention::pass(&world.pool, archive, Duration::ZERO, &stop).await.expect("a pass");
    retention::tidy(&world.pool, &mut removed).await.expect("tidied");
    removed
}

async fn finished(world: &World, count: usize) -> Vec<Uuid> {
    let mut tasks = Vec::new();
    for n in 0..count {
        let request = serde_json::json!({"template": "two", "idempotency_key": format!("key-{}-{n}", Uuid::new_v4())});
        tasks.push(world.submit_with(request).await.expect("submitted"));
    }
    assert_eq!(world.finish(&tasks).await, vec!["complete"; count]);
    world.assert_complete().await;
    tasks
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_task_goes_with_everything_that_is_its_and_a_young_one_stays() {
    let world = World::start(Setup { orchestrators: 2, workers: 2, ..Setup::default() }).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    let tasks = finished(&world, 6).await;
    let suffix = create_week(&world, 30).await;
    let old = age(&world, &tasks[..3], 30).await;
    sqlx::query("insert into tasker.due (due_at, kind, task_uuid) values (clock_timestamp() + interval '9 d', 'total_timeout', $1)")
        .bind(old[0])
        .execute(&world.pool)
        .await
        .expect("a timeout that lies ahead");
    assert_eq!(pass(&world, None).await, Removed::default(), "without a policy nothing goes");

    keep_a_week(&world, false).await;
    assert_eq!(retention::expired(&world.pool, false).await.expect("counted"), 3);
    let removed = pass(&world, None).await;
    assert_eq!((removed.tasks, removed.weeks), (3, 1), "the week of the log went whole");
    assert_eq!(world.words("select count(*)::text from pg_class where relname like '%_' || '20%' and relkind = 'r' and oid in (select inhrelid from pg_inherits where inhparent = 'tasker.transitions'::regclass)").await.len(), 1);
    let gone: Option<String> = sqlx::query_scalar("select to_regclass('tasker.transitions' || $1)::text")
        .bind(&suffix)
        .fetch_one(&world.pool)
        .await
        .expect("looked");
    assert_eq!(gone, None);
    for table in TABLES {
        let left: i64 =
            sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from tasker.{table} where task_uuid = any($1)")))
                .bind(&old)
                .fetch_one(&world.pool)
                .await
                .expect("a count");
        assert_eq!(left, 0, "{table}");
        assert!(rows(&world, table).await > 0, "{table}: the young ones stay");
    }
    assert_eq!(rows(&world, "tasks").await, 3);
    assert_eq!(world.number("select count(*) from tasker.due where kind = 'total_timeout'").await, 0);
    assert_eq!(pass(&world, None).await, Removed::default(), "a second pass finds nothing");
    world.assert_sound().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_unexported_locked_or_needed_stays() {
    let world = World::start(Setup::default()).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    keep_a_week(&world, false).await;
    let tasks = finished(&world, 4).await;
    let old = age(&world, &tasks, 30).await;
    // One is open again; one is the child of an open task; one is locked by somebody.
    for statement in [
        format!("update tasker.tasks set state = 'suspended', finished_at = null where task_uuid = '{}'", old[0]),
        format!("update tasker.tasks set parent_task_uuid = '{}' where task_uuid = '{}'", old[0], old[1]),
        "insert into tasker.export_batches (batch_id, instance, task_uuids, at) values (gen_random_uuid(), null, '{}', clock_timestamp() - interval '90 days')".to_owned(),
    ] {
        sqlx::query(AssertSqlSafe(statement)).execute(&world.pool).await.expect("done");
    }
    // (The batch names no task, so whoever recovers it has nothing to send but must first do so.)
    let before = retention::expired(&world.pool, false).await.expect("counted");
    assert!(before <= 2);
    sqlx::query("delete from tasker.export_batches").execute(&world.pool).await.expect("acknowledged");
    let mut holding = world.pool.begin().await.expect("a transaction");
    sqlx::query("select from tasker.tasks where task_uuid = $1 for no key update")
        .bind(old[2])
        .execute(&mut *holding)
        .await
        .expect("locked");
    assert_eq!(pass(&world, None).await.tasks, 1, "only the one that nothing holds");
    holding.rollback().await.expect("let go");
    assert_eq!(pass(&world, None).await.tasks, 1);
    let left: Vec<Uuid> = sqlx::query_scalar("select task_uuid from tasker.tasks order by 1")
        .fetch_all(&world.pool)
        .await
        .expect("tasks");
    let mut expected = vec![old[0], old[1]];
    expected.sort_unstable();
    assert_eq!(left, expected);
    // No row of a removed one is left behind in the log.
    let strangers = "select count(*) from tasker.transitions l where not exists (select from tasker.tasks t where t.task_uuid = l.task_uuid)";
    assert_eq!(world.number(strangers).await, 0);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_before_its_spans_are_acknowledged() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    keep_a_week(&world, false).await;
    let task = world.submit("two").await;
    sqlx::query("update tasker.tasks set state = 'complete', finished_at = created_at where task_uuid = $1")
        .bind(task)
        .execute(&world.pool)
        .await
        .expect("ended");
    age(&world, &[task], 30).await;
    sqlx::query("insert into tasker.export_batches (batch_id, instance, task_uuids, at) values (gen_random_uuid(), null, '{}', clock_timestamp() - interval '90 days')").execute(&world.pool).await.expect("a batch");
    assert_eq!(pass(&world, None).await.tasks, 0);
    sqlx::query("delete from tasker.export_batches").execute(&world.pool).await.expect("acknowledged");
    assert_eq!(pass(&world, None).await.tasks, 1);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_holds_the_whole_task_before_it_goes() {
    let world = World::start(Setup::default()).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    keep_a_week(&world, true).await;
    let tasks = finished(&world, 2).await;
    let old = age(&world, &tasks, 30).await;
    assert_eq!(pass(&world, None).await.tasks, 0, "the policy asks for an archive");
    let folder = tempfile::tempdir().expect("a folder");
    assert!(
        retention::pass(&world.pool, Some(&folder.path().join("none/file")), Duration::ZERO, &CancellationToken::new())
            .await
            .is_err()
    );
    assert_eq!(rows(&world, "tasks").await, 2, "what cannot be archived stays");
    let file = folder.path().join("tasks.jsonl");
    assert_eq!(pass(&world, Some(&file)).await.tasks, 2);
    let text = std::fs::read_to_string(&file).expect("the archive");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 2);
    for line in &lines {
        let id: Uuid = serde_json::from_value(line["task"]["task_uuid"].clone()).expect("a uuid");
        assert!(old.contains(&id));
        assert_eq!(line["template"]["name"], "two");
        assert_eq!(line["steps"][1]["name"], "b");
        assert_eq!(line["attempts"].as_array().map(Vec::len), Some(2));
        assert!(line["transitions"].as_array().is_some_and(|rows| rows.len() > 10));
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quarantine_and_counters_are_tidied() {
    let world = World::start(Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    for statement in [
        "insert into tasker.quarantine (queue, msg_id, read_ct, reason, enqueued_at, quarantined_at)
         select q, 1, 1, 'bad', now(), now() - make_interval(days => d)
         from unnest(array['worker_tests', 'worker_tests__slow', 'worker_other', 'task_requests']) q, unnest(array[1, 30]) d",
        "insert into tasker.counters (name, n, at) select 'late', 2, now() - interval '1 h' from generate_series(1, 300)",
        "insert into tasker.counters (name, n) values ('late', 5)",
    ] {
        sqlx::query(statement).execute(&world.pool).await.expect("inserted");
    }
    keep_a_week(&world, false).await;
    assert_eq!(pass(&world, None).await.messages, 2, "of the namespace with a policy");
    assert_eq!(world.counter("late").await, 605);
    assert_eq!(rows(&world, "counters").await, 2);
    let oldest = world.words("select what from tasker.oldest_rows() where age_s > 0 order by 1").await;
    assert_eq!(oldest, ["log", "quarantine"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_killed_processes_left_is_forgotten_and_who_lives_is_not() {
    let world = World::start(Setup::by_hand()).await;
    // A lease that nobody has to renew meanwhile.
    world.register("one", "steps:\n  - {name: a, handler: ok, timeouts: {heartbeat: 1h}}").await;
    for worker in ["dead", "leasing", "living"] {
        world.hello(worker, None, &["ok"], 1).await;
    }
    let task = world.submit("one").await;
    let claim = world.claim_as("leasing").await;
    let readers =
        "select reader from tasker.readers where reader in ('dead', 'leasing', 'living', 'killed') order by 1";
    for statement in [
        "update tasker.workers set seen_at = seen_at - interval '2 days' where worker in ('dead', 'leasing')",
        "insert into tasker.readers (queue, reader, asleep) values ('step_results', 'killed', true)",
        "update tasker.readers set seen_at = seen_at - interval '2 days' where reader in ('dead', 'leasing', 'living', 'killed')",
        "insert into tasker.instances (instance, seen_at, version)
         values ('00000000-0000-4000-8000-000000000000', clock_timestamp() - interval '2 days', '0')",
    ] {
        sqlx::query(statement).execute(&world.pool).await.expect(statement);
    }
    retention::tidy(&world.pool, &mut Removed::default()).await.expect("tidied");
    assert_eq!(world.words("select worker from tasker.workers order by 1").await, ["hand", "leasing", "living"]);
    assert_eq!(world.words(readers).await, ["leasing", "living"]);
    assert_eq!(world.number("select count(*) from tasker.instances where version = '0'").await, 0);
    // The orchestrator has its readers, and is woken as before.
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_nothing_will_move_is_found_and_can_be_ended() {
    let world = World::start(Setup::by_hand()).await;
    world.register("sleeps", "steps: [{name: rest, wait: {sleep: 1h}}]").await;
    let task = world.submit("sleeps").await;
    eventually("it sleeps", async || {
        (world.number("select count(*) from tasker.steps where state = 'waiting'").await == 1).then_some(())
    })
    .await;
    assert_eq!(retention::look_for_stuck(&world.pool).await.expect("looked"), 0);
    // What no program of ours does.
    sqlx::query("delete from tasker.due").execute(&world.pool).await.expect("deleted");
    assert_eq!(retention::look_for_stuck(&world.pool).await.expect("looked"), 1);
    sqlx::query("select tasker.cancel_task($1, 'stuck')").bind(task).execute(&world.pool).await.expect("asked");
    assert_eq!(world.finish(&[task]).await, ["cancelled"]);
    assert_eq!(retention::look_for_stuck(&world.pool).await.expect("looked"), 0);
    world.end().await;
}
