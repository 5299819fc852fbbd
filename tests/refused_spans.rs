//! A receiver that refuses spans costs only these: what is too large is sent in smaller requests,
//! what is refused for good is set aside and sent again when somebody says so, and the newest reason
//! is told.

use std::collections::HashSet;

use http::StatusCode;
use serde_json::{Value, json};
use tasker_orchestration::export::batches;
use tasker_tests::receiver::Behaviour;
use tasker_tests::worker::{self, Answer};
use tonic::Code;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

/// What the one orchestrator of this world says of its exports.
fn told(world: &World) -> Value {
    world.orchestrators[0].export_stats().expect("traced").summary()
}

async fn nothing_waits(world: &World) {
    eventually("no batch waits, so that retention goes on", async || {
        (world.number("select count(*) from tasker.export_batches").await == 0).then_some(())
    })
    .await;
}

async fn set_aside(world: &World) -> batches::SetAside {
    batches::set_aside(&mut world.pool.acquire().await.expect("a connection")).await.expect("asked")
}

async fn send_again(world: &World) {
    let mut conn = world.pool.acquire().await.expect("a connection");
    assert!(batches::send_again(&mut conn).await.expect("given back") > 0);
}

/// So many tasks at once, with requests of some size.
async fn work_through(world: &World, tasks: usize) -> Vec<Uuid> {
    world.register_steps("wide", "a: ok\nb: ok <- a\nc: ok <- a\nd: ok <- a\ne: ok <- a\nf: ok <- b c d e").await;
    let mut submitted = Vec::new();
    for _ in 0..tasks {
        submitted.push(world.submit("wide").await);
    }
    assert!(world.finish(&submitted).await.iter().all(|state| state == "complete"));
    submitted
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_takes_no_large_request_gets_everything_in_smaller_ones() {
    for protocol in ["grpc", "http/protobuf"] {
        let world = World::start(Setup { protocol, ..Setup::default() }).await;
        // Twice the size of the largest span; one settle of one task has more.
        world.receiver.behave(Behaviour::TooLarge(2_500));
        work_through(&world, 20).await;
        world.assert_complete().await;
        assert_eq!(set_aside(&world).await.batches, 0, "{protocol}");
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_that_no_request_can_carry_is_set_aside_and_the_others_arrive() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("one", "a: ok").await;
    world.receiver.behave(Behaviour::TooLarge(20_000));
    let large = world.submit("one").await;
    let claim = world.claim().await;
    let mut result = worker::result(&claim, &Answer::Success(json!({}))).expect("a result");
    let attributes: Value =
        (0..10).map(|n| (format!("k{n}"), json!("x".repeat(4000)))).collect::<serde_json::Map<_, _>>().into();
    result["milestones"] = json!([{"name": "large", "attributes": attributes}]);
    assert_eq!(world.report_raw(&[result]).await, [(true, false)]);
    let small = world.submit("one").await;
    let claim = world.claim().await;
    world.succeed(&claim).await;
    assert_eq!(world.finish(&[large, small]).await, ["complete"; 2]);

    nothing_waits(&world).await;
    assert!(world.spans_of(small).iter().any(|span| span.span.name == "task.orchestration"));
    let aside = set_aside(&world).await;
    assert_eq!(aside.batches, 1, "{aside:?}");
    let reason = aside.reason.expect("a reason");
    assert!(reason.contains("larger than"), "{reason}");
    assert_eq!(told(&world)["set_aside"], 1);

    world.receiver.behave(Behaviour::Accept);
    send_again(&world).await;
    world.assert_complete().await;
    assert_eq!(set_aside(&world).await.batches, 0);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_for_good_is_set_aside_alone_and_sent_again_when_told() {
    for protocol in ["grpc", "http/protobuf"] {
        let world = World::start(Setup { protocol, ..Setup::default() }).await;
        world.register_steps("one", "a: ok\nb: ok <- a").await;
        world.receiver.behave(Behaviour::RefuseSpans("unwanted"));
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for n in 0..20 {
            let is_bad = n % 4 == 3;
            let id = if is_bad { "unwanted".to_owned() } else { format!("good-{n}") };
            let request = json!({"template": "one", "correlation_id": id});
            let task = world.submit_with(request).await.expect("submitted");
            (if is_bad { &mut bad } else { &mut good }).push(task);
        }
        assert_eq!(world.finish(&good).await, vec!["complete"; good.len()]);
        assert_eq!(world.finish(&bad).await, vec!["complete"; bad.len()]);
        nothing_waits(&world).await;
        let roots: HashSet<String> = world
            .receiver
            .spans()
            .iter()
            .filter(|span| span.span.name == "task.orchestration")
            .filter_map(|span| span.text("task_uuid").map(str::to_owned))
            .collect();
        assert_eq!(roots, good.iter().map(Uuid::to_string).collect::<HashSet<_>>(), "{protocol}");
        let aside = set_aside(&world).await;
        assert!(aside.batches > 0 && aside.oldest_at <= aside.newest_at, "{aside:?}");
        assert!(aside.reason.as_deref().is_some_and(|reason| reason.contains("told to refuse")), "{aside:?}");
        assert!(told(&world)["set_aside"].as_u64().is_some_and(|spans| spans > 0), "{}", told(&world));

        world.receiver.behave(Behaviour::Accept);
        send_again(&world).await;
        nothing_waits(&world).await;
        world.assert_sound().await;
        world.assert_all_spans_there().await;
        assert_eq!(set_aside(&world).await.batches, 0);
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_breaks_the_receiver_again_and_again_holds_up_nobody() {
    let world = World::start(Setup { protocol: "http/protobuf", ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    world.receiver.behave(Behaviour::BreakAt("fatal"));
    let bad = world.submit_with(json!({"template": "one", "correlation_id": "fatal"})).await.expect("submitted");
    assert_eq!(world.finish(&[bad]).await, ["complete"]);
    let good = world.submit("one").await;
    assert_eq!(world.finish(&[good]).await, ["complete"]);
    nothing_waits(&world).await;
    assert!(world.spans_of(good).iter().any(|span| span.span.name == "task.orchestration"));
    assert!(set_aside(&world).await.reason.is_some_and(|reason| reason.contains("500")));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_reason_is_told() {
    let mut world = World::start(Setup { orchestrators: 0, protocol: "http/protobuf", ..Setup::default() }).await;
    world.register_steps("one", "a: ok").await;
    world.receiver.down().await;
    world.add_orchestrator().await;
    let says = async |words: &str| {
        eventually(&format!("it says {words}"), async || {
            told(&world)["problem"].as_str().is_some_and(|problem| problem.contains(words)).then_some(())
        })
        .await;
    };
    says("refused").await;
    let task = world.submit("one").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    says("cannot be reached").await;
    world.receiver.behave(Behaviour::Refuse(Code::Unauthenticated, StatusCode::UNAUTHORIZED));
    let mut receiver = std::mem::replace(&mut world.receiver, tasker_tests::receiver::Receiver::start().await);
    receiver.up().await;
    world.receiver = receiver;
    let says = async |words: &str| {
        eventually(&format!("it says {words}"), async || {
            told(&world)["problem"].as_str().is_some_and(|problem| problem.contains(words)).then_some(())
        })
        .await;
    };
    says("401 Unauthorized told to refuse").await;
    assert!(world.number("select count(*) from tasker.export_batches").await > 0, "nothing is set aside for that");
    world.receiver.behave(Behaviour::Accept);
    world.assert_complete().await;
    assert_eq!(told(&world)["problem"], Value::Null);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_words_of_a_partial_success_are_kept() {
    let world = World::start(Setup::default()).await;
    world.receiver.behave(Behaviour::Partial(1));
    work_through(&world, 2).await;
    eventually("its words are kept", async || (told(&world)["rejected_because"] == "told to reject").then_some(()))
        .await;
    assert!(told(&world)["rejected"].as_u64().is_some_and(|spans| spans > 0));
    world.end().await;
}
