//! A person tries a failed task again: a new generation, the same trace, nothing repeated.

use tasker_tests::receiver::Received;
use tasker_tests::worker::Answer;

use crate::harness::{Setup, World};

#[tokio::test(flavor = "multi_thread")]
async fn second_generation_keeps_what_is_done_and_links_to_the_first() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("chain", "a: ok\nb: broken <- a\nc: ok <- b").await;
    let task = world.submit("chain").await;
    let a = world.claim().await;
    world.succeed(&a).await;
    let b = world.claim().await;
    world.report(&b, &Answer::Error("Broken", false)).await;
    assert_eq!(world.finish(&[task]).await, ["error"]);
    assert_eq!(world.steps(task).await, ["a: complete", "b: error", "c: cancelled"]);

    let answered: String = sqlx::query_scalar("select tasker.retry_task($1, 'fixed it', 'ann')")
        .bind(task)
        .fetch_one(&world.pool)
        .await
        .expect("asked");
    assert_eq!(answered, "accepted");
    let again = world.claim().await;
    assert_eq!((&*again.step_name, again.attempt), ("b", 2), "attempt numbers never restart");
    world.succeed(&again).await;
    let c = world.claim().await;
    world.succeed(&c).await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert_eq!(world.of_task(task, "generation").await.as_deref(), Some("2"));
    world.assert_complete().await;

    let spans = world.spans_of(task);
    let roots: Vec<&Received> = spans.iter().filter(|span| span.span.name == "task.orchestration").collect();
    assert_eq!(roots.len(), 2);
    let of = |generation| {
        *roots.iter().find(|span| span.int("generation") == Some(generation)).expect("a root of each generation")
    };
    let (first, second) = (of(1), of(2));
    assert_eq!((first.text("outcome"), second.text("outcome")), (Some("failure"), Some("success")));
    assert_eq!(second.span.links.len(), 1);
    assert_eq!(second.span.links[0].span_id, first.span.span_id);
    assert!(second.span.start_time_unix_nano >= first.span.end_time_unix_nano);
    let executions = |root: &Received| -> Vec<(String, i64)> {
        let mut all: Vec<_> = spans
            .iter()
            .filter(|span| span.span.name == "step.execution" && span.span.parent_span_id == root.span.span_id)
            .map(|span| (span.text("step_name").unwrap_or("").to_owned(), span.int("attempt_number").unwrap_or(0)))
            .collect();
        all.sort();
        all
    };
    assert_eq!(executions(first), [("a".to_owned(), 1), ("b".to_owned(), 1)]);
    assert_eq!(executions(second), [("b".to_owned(), 2), ("c".to_owned(), 1)]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn task_that_goes_well_is_not_tried_again() {
    let world = World::start(Setup::default()).await;
    world.register_steps("one", "a: ok").await;
    let task = world.submit("one").await;
    world.finish(&[task]).await;
    let answered: String =
        sqlx::query_scalar("select tasker.retry_task($1)").bind(task).fetch_one(&world.pool).await.expect("asked");
    assert_eq!(answered, "the task is completed; only a failed, cancelled or blocked task can be retried");
    world.assert_complete().await;
    world.end().await;
}
