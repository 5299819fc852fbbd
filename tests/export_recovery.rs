//! Telemetry is harmless and honest: whatever the receiver does, work goes on, and its spans
//! arrive afterwards, each with the ids and content that the log gives.

use std::sync::atomic::Ordering;

use http::StatusCode;
use tasker_tests::receiver::Behaviour;
use tonic::Code;

use crate::harness::{Setup, World, eventually};
use crate::two_orchestrators_two_workers::{assert_outcomes, register_mix, submit_mix};

const TASKS: usize = 20;

async fn work_through(world: &World) {
    let tasks = submit_mix(world, TASKS).await;
    assert_outcomes(&world.finish(&tasks).await);
}

async fn misbehaving(protocol: &'static str, behaviours: &[Behaviour]) {
    let world = World::start(Setup { protocol, ..Setup::default() }).await;
    register_mix(&world).await;
    for behaviour in behaviours {
        world.receiver.behave(behaviour.clone());
        let seen = world.receiver.requests();
        work_through(&world).await;
        world.receiver.wait_for_requests(seen + 1).await;
        assert!(
            world.number("select count(*) from tasker.export_batches").await > 0,
            "{behaviour:?}: nothing is forgotten unacknowledged"
        );
        assert_eq!(world.receiver.spans(), []);
    }
    world.receiver.behave(Behaviour::Accept);
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn receiver_that_refuses_or_hangs_up_gets_everything_later_over_grpc() {
    let refuse = Behaviour::Refuse(Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE);
    misbehaving("grpc", &[refuse, Behaviour::CloseMidStream, Behaviour::GarbageBytes]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn receiver_that_answers_errors_or_pages_gets_everything_later_over_http() {
    let refuse = Behaviour::Refuse(Code::Internal, StatusCode::INTERNAL_SERVER_ERROR);
    misbehaving("http/protobuf", &[refuse, Behaviour::WebPage, Behaviour::CloseMidStream]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn receiver_that_hangs_holds_up_no_work() {
    for protocol in ["grpc", "http/protobuf"] {
        misbehaving(protocol, &[Behaviour::Hang]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn receiver_that_is_down_at_first_and_again_later_gets_everything() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    register_mix(&world).await;
    world.receiver.down().await;
    world.add_orchestrator().await;
    work_through(&world).await;
    world.receiver.up().await;
    work_through(&world).await;
    world.receiver.down().await;
    work_through(&world).await;
    world.receiver.up().await;
    world.assert_complete().await;
    let exported = world.orchestrators[0].export_stats().expect("traced").exported.load(Ordering::Relaxed);
    assert!(exported > 0);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_orchestrator_left_is_adopted_and_the_same() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    register_mix(&world).await;
    world.receiver.behave(Behaviour::Hang);
    let first = world.orchestrator_process().await;
    work_through(&world).await;
    first.kill().await;
    let left = world.number("select count(*) from tasker.export_batches").await;
    assert!(left > 0, "it had exported nothing");
    world.receiver.behave(Behaviour::Accept);
    world.add_orchestrator().await;
    world.assert_complete().await;
    let re_exported = world.orchestrators[0].export_stats().expect("traced").re_exported.load(Ordering::Relaxed);
    assert_eq!(usize::try_from(re_exported), Ok(world.receiver.spans().len()), "all of them came from the log");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orchestrator_that_stops_in_good_order_owes_nothing() {
    let world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    register_mix(&world).await;
    let process = world.orchestrator_process().await;
    work_through(&world).await;
    process.end().await;
    assert_eq!(world.number("select count(*) from tasker.export_batches").await, 0, "delivered before it ended");
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn export_that_outlives_its_deadline_is_left_to_the_next() {
    let mut world = World::start(Setup::default()).await;
    register_mix(&world).await;
    world.receiver.behave(Behaviour::Hang);
    work_through(&world).await;
    let impatient = world.orchestrators.pop().expect("one");
    impatient.shutdown(std::time::Duration::from_millis(100)).await;
    assert!(world.number("select count(*) from tasker.export_batches").await > 0);
    world.receiver.behave(Behaviour::Accept);
    world.add_orchestrator().await;
    eventually("the next one takes over at once", async || {
        (world.number("select count(*) from tasker.export_batches").await == 0).then_some(())
    })
    .await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_large_logs_is_read_in_pages_and_is_the_same() {
    const PAGE: u64 = 2000;
    let mut world = World::start(Setup { orchestrators: 0, workers: 2, ..Setup::default() }).await;
    let items: Vec<usize> = (0..600).collect();
    let map = "steps:\n  - {name: each, handler: ok, for_each: '${input.items}'}";
    world.register("map", map).await;
    let wide: Vec<String> = (0..20).map(|n| format!("s{n}: ok")).collect();
    world.register_steps("wide", &wide.join("\n")).await;
    world.receiver.behave(Behaviour::Hang);
    let first = world.orchestrator_process().await;
    let request = |items: &[usize]| serde_json::json!({"template": "map", "input": {"items": items}});
    let mut tasks = vec![world.submit_with(request(&items)).await.expect("submitted")];
    for _ in 0..40 {
        tasks.push(world.submit("wide").await);
    }
    assert_eq!(world.finish_within(&tasks, crate::harness::DEADLINE * 3).await, vec!["complete"; tasks.len()]);
    // A second generation ends with another root.
    for task in &tasks[1..3] {
        let asked: String = sqlx::query_scalar("select tasker.rerun_task($1, array['s0'], 'again')")
            .bind(task)
            .fetch_one(&world.pool)
            .await
            .expect("asked");
        assert_eq!(asked, "accepted");
    }
    eventually("they have ended again", async || {
        let again = "select count(*) from tasker.tasks where generation = 2 and state = 'complete'";
        (world.number(again).await == 2).then_some(())
    })
    .await;
    first.kill().await;
    let rows = world.number("select count(*) from tasker.transitions").await;
    assert!(u64::try_from(rows).is_ok_and(|rows| rows > 3 * PAGE), "{rows} rows do not fill three pages");
    world.receiver.behave(Behaviour::Accept);
    world.add_orchestrator().await;
    world.assert_complete().await;
    let most = world.orchestrators[0].export_stats().expect("traced").summary()["most_rows_read"].as_u64();
    assert!(most.is_some_and(|most| most > 0 && most <= PAGE), "{most:?} of {rows} rows were in memory at once");
    world.end().await;
}
