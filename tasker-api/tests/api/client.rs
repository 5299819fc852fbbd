//! The Rust client against a server.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::{TryStreamExt as _, pin_mut};
use serde_json::json;
use tasker_api::Config;
use tasker_api::auth::Role;
use tasker_shared::client::Submit;
use tasker_shared::client::http::{Bulk, BulkAction, BulkFilter, Event, EventQuery, HttpClient, HttpError, TaskQuery};
use tasker_shared::store::views::{QueueView, TaskView};
use uuid::Uuid;

use crate::harness::{World, order};

async fn shop() -> (World, HttpClient) {
    let world = World::start().await;
    world.register(&order("shop")).await;
    let key = world.key(Role::Operator).await;
    let client = HttpClient::new(&world.url, &key).expect("a client");
    (world, client)
}

fn order_of(id: &str) -> Submit {
    Submit { correlation_id: Some(id.into()), ..Submit::new("shop", "order", json!({"order_id": id})) }
}

/// Nobody runs it: ended by hand, as an orchestrator would.
async fn end(world: &World, task: Uuid) {
    for sql in [
        "update tasker.tasks set state = 'complete', version = version + 1, finished_at = clock_timestamp(), open_steps = 0 where task_uuid = $1",
        "insert into tasker.transitions (task_uuid, entity_uuid, version, task_version, generation, from_state, to_state, event, began_at, at)
         select task_uuid, task_uuid, version, version, 1, 'pending', 'complete', 'AllStepsSuccessful', last_at, clock_timestamp() from tasker.tasks where task_uuid = $1",
    ] {
        sqlx::query(sql).bind(task).execute(world.pool()).await.expect("ended");
    }
}

#[tokio::test]
async fn a_task_is_submitted_once_in_its_callers_trace() {
    let (world, client) = shop().await;
    let first = Submit {
        idempotency_key: Some("k".into()),
        traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        baggage: Some("team=blue".into()),
        ..order_of("A")
    };
    let submitted = client.submit(&first).await.expect("submitted");
    let again = client.submit(&first).await.expect("submitted again");
    assert_eq!((submitted.is_new, again.is_new, again.task_uuid), (true, false, submitted.task_uuid));
    let task = client.task(submitted.task_uuid).await.expect("the task");
    assert_eq!(
        (&*task.trace_id, task.status, &*task.correlation_id),
        ("4bf92f3577b34da6a3ce929d0e0e4736", "queued", "A")
    );
    let kept: String = sqlx::query_scalar("select baggage from tasker.tasks").fetch_one(world.pool()).await.unwrap();
    assert_eq!(kept, "team=blue");

    let other = Submit { input: json!({"order_id": "B"}), ..first };
    let Err(HttpError::Refused(problem)) = client.submit(&other).await else { panic!("a key is used once") };
    assert_eq!(
        (&*problem.code, problem.status, problem.field.as_deref()),
        ("idempotency_conflict", 409, Some("idempotency_key"))
    );

    // Each task of a batch may have a trace of its own.
    let own =
        Submit { traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()), ..order_of("C") };
    let bad = Submit::new("shop", "order", json!({}));
    let answers = client.submit_many(&[order_of("B"), own, bad]).await.expect("a batch");
    let codes: Vec<Option<&str>> = answers.iter().map(|answer| answer.code.as_deref()).collect();
    assert_eq!(codes, [None, None, Some("invalid_request")]);
    assert!(answers[2].detail.as_deref().unwrap().contains("order_id"));
    let joined = client.task(answers[1].task_uuid.unwrap()).await.expect("the task");
    assert_eq!(joined.trace_id, "0af7651916cd43dd8448eb211c80319c");
}

#[tokio::test]
async fn lists_go_on_to_their_end() {
    let (_world, client) = shop().await;
    let orders: Vec<Submit> = (0..5).map(|n| order_of(&format!("ORD-{n}"))).collect();
    let submitted: HashSet<Uuid> =
        client.submit_many(&orders).await.expect("a batch").into_iter().filter_map(|answer| answer.task_uuid).collect();
    let query = TaskQuery { limit: Some(2), status: Some("queued,running".into()), ..TaskQuery::default() };
    let mut pages = client.tasks(query.clone());
    assert_eq!(pages.next().await.unwrap().map(|page| page.len()), Some(2));
    let items = client.tasks(query).items();
    pin_mut!(items);
    let mut seen = HashSet::new();
    while let Some(task) = items.try_next().await.expect("the list goes on") {
        assert!(seen.insert(task.task_uuid), "twice in the list");
    }
    assert_eq!(seen, submitted);
    let one = TaskQuery { correlation_id: Some("ORD-3".into()), ..TaskQuery::default() };
    assert_eq!(client.tasks(one).next().await.unwrap().unwrap()[0].correlation_id, "ORD-3");
    // What has no method of its own.
    let queues = client.pages::<QueueView>("/v1/queues", ()).next().await.expect("queues").unwrap();
    assert!(queues.iter().any(|queue| queue.queue == "worker_shop"), "{queues:?}");
}

#[tokio::test]
async fn who_waits_is_told_when_the_task_has_ended() {
    let (world, client) = shop().await;
    let task = client.submit(&order_of("A")).await.expect("submitted").task_uuid;
    let mut events = client.events(&EventQuery { task: Some(task), ..EventQuery::default() }).await.expect("a stream");
    assert_eq!(events.next().await.unwrap(), Some(Event::Hello));
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.wait(task).await }
    });
    end(&world, task).await;
    let limit = Duration::from_secs(20);
    let ended: TaskView = tokio::time::timeout(limit, waiting).await.expect("told in time").unwrap().expect("the task");
    assert_eq!((ended.task_uuid, ended.status), (task, "completed"));
    let told = async {
        loop {
            match events.next().await.expect("the stream goes on").expect("it does not end") {
                Event::Task(seen) if seen.is_finished() => return seen.task_uuid,
                _ => {}
            }
        }
    };
    assert_eq!(tokio::time::timeout(limit, told).await.expect("told in time"), task);
    // What ended before is known at once.
    assert_eq!(client.wait(task).await.expect("the task").status, "completed");
    let unknown = client.wait(Uuid::nil()).await.expect_err("there is none");
    assert_eq!(unknown.code(), Some("not_found"));
}

#[tokio::test]
async fn acts_are_asked_for_and_refusals_have_their_code() {
    let (world, client) = shop().await;
    let task = client.submit(&order_of("A")).await.expect("submitted").task_uuid;
    assert_eq!(client.act(task, "resume", None).await.unwrap_err().code(), Some("conflict"));
    let why = client.why(task).await.expect("an answer");
    assert!(why.sentence.starts_with("queued"), "{}", why.sentence);
    let mut bulk = Bulk {
        filter: BulkFilter { status: Some("queued".into()), ..BulkFilter::default() },
        action: BulkAction::Cancel,
        dry_run: true,
        reason: None,
    };
    let preview = client.bulk(&bulk).await.expect("an answer");
    assert_eq!((preview.matched, preview.asked, preview.sample), (1, 0, vec![task]));
    bulk.dry_run = false;
    assert_eq!(client.bulk(&bulk).await.expect("an answer").asked, 1);
    client.act(task, "cancel", Some("changed my mind")).await.expect("asked");
    let refused = client.signal(task, "approve", &json!(true)).await.unwrap_err();
    assert!(refused.code().is_some() && !refused.is_transient(), "{refused}");
    assert_eq!(client.result(task).await.expect("an answer"), [].into());
    assert_eq!(client.steps(task).next().await.unwrap(), Some(vec![]));

    let stranger = HttpClient::new(&world.url, "tsk_0_0").unwrap();
    assert_eq!(stranger.task(task).await.unwrap_err().code(), Some("unauthenticated"));
    world.stop.cancel();
    world.running.await.unwrap();
    let gone = client.task(task).await.unwrap_err();
    assert!(matches!(gone, HttpError::NoAnswer(_)) && gone.is_transient(), "{gone}");
}

#[tokio::test]
async fn a_client_that_must_wait_is_told_how_long() {
    let world = World::with(Config { rate_per_s: 1, burst: 1, ..Config::default() }).await;
    let client = HttpClient::new(&world.url, &world.key(Role::Viewer).await).unwrap();
    client.tasks(TaskQuery::default()).next().await.expect("the first");
    let Err(HttpError::Refused(problem)) = client.tasks(TaskQuery::default()).next().await else {
        panic!("the second came too soon");
    };
    assert_eq!((&*problem.code, problem.retry_after), ("rate_limited", Some(1)));
}
