//! Decisions, conditions and joins: what was not chosen is skipped, once, and the trace says so.

use std::sync::Arc;

use serde_json::json;
use tasker_tests::worker::{Answer, Claim, answer};

use crate::harness::{DEADLINE, Setup, World, assert_tree, storm};

const SHIPPING: &str = "
steps:
  - {name: route, handler: ok, branches: [express, parcel], input: {route: '${input.route}'}}
  - {name: express, handler: ok, depends_on: [route]}
  - {name: parcel, handler: flaky, depends_on: [route], retry: {initial_interval: 10ms}}
  - {name: wrap, handler: ok, depends_on: [parcel]}
  - {name: insure, handler: ok, depends_on: [route], when: '${input.total} >= 500'}
  - {name: label, handler: ok, depends_on: [express, wrap, insure], join: taken,
     input: {wrapped: '${steps.wrap.output.step}', insured: '${steps.insure.output.step}'}}
  - {name: first, handler: ok, depends_on: [express, insure], join: any}
";

/// The decision takes the route of its input; every other handler does as it is called.
fn work(claim: &Claim) -> Answer {
    match claim.input.get("route").and_then(|route| route.as_str()) {
        Some(route) => Answer::Success(json!({ "branch": route })),
        None => answer(claim),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_decision_did_not_choose_is_skipped_with_all_that_follows() {
    let world = World::start(Setup { orchestrators: 2, workers: 2, work: Arc::new(work), ..Setup::default() }).await;
    world.register("shipping", SHIPPING).await;
    let (mut tasks, mut expected) = (Vec::new(), Vec::new());
    for n in 0..storm(60, 600) {
        let route = ["express", "parcel", "pigeon"][n % 3];
        let input = json!({"route": route, "total": if n % 2 == 0 { 700 } else { 7 }});
        tasks.push(world.submit_with(json!({"template": "shipping", "input": input})).await.expect("submitted"));
        expected.push(if route == "pigeon" { "error" } else { "complete" });
    }
    assert_eq!(world.finish_within(&tasks, DEADLINE * 2).await, expected);
    // express, 700
    assert_eq!(
        world.steps(tasks[0]).await,
        [
            "route: complete",
            "express: complete",
            "parcel: skipped",
            "wrap: skipped",
            "insure: complete",
            "label: complete",
            "first: complete"
        ]
    );
    // parcel, 7
    assert_eq!(
        world.steps(tasks[1]).await,
        [
            "route: complete",
            "express: skipped",
            "parcel: complete",
            "wrap: complete",
            "insure: skipped",
            "label: complete",
            "first: skipped"
        ]
    );
    assert_eq!(world.of_task(tasks[2], "error_type").await.as_deref(), Some("unknown_branch"));
    let inputs = world
        .words("select s.input::text from tasker.steps s join tasker.tasks t using (task_uuid) where s.step_index = 5 and s.state = 'complete' group by s.input::text order by s.input::text collate \"C\"")
        .await;
    assert_eq!(
        inputs,
        [
            r#"{"insured": "insure", "wrapped": "wrap"}"#,
            r#"{"insured": "insure", "wrapped": null}"#,
            r#"{"insured": null, "wrapped": "wrap"}"#,
            r#"{"insured": null, "wrapped": null}"#
        ]
    );
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_skip_is_a_span_of_its_own_under_the_task() {
    let world = World::start(Setup { work: Arc::new(work), ..Setup::default() }).await;
    world
        .register(
            "shipping",
            "
steps:
  - {name: route, handler: ok, branches: [express, parcel], input: {route: '${input.route}'}}
  - {name: express, handler: ok, depends_on: [route], when: '${input.total} > 1'}
  - {name: parcel, handler: ok, depends_on: [route]}
  - {name: after, handler: ok, depends_on: [parcel]}
",
        )
        .await;
    let input = json!({"route": "express", "total": 1});
    let task = world.submit_with(json!({"template": "shipping", "input": input})).await.expect("submitted");
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    world.assert_complete().await;
    let spans: Vec<_> = world
        .spans_of(task)
        .into_iter()
        .filter(|span| {
            span.span.name != "task.state_transition"
                && !matches!(span.span.name.as_str(), "step.discovery" | "step.enqueuing" | "result.evaluation")
        })
        .collect();
    assert_tree(
        &spans,
        &["step_name", "event", "outcome"],
        "
        task.orchestration outcome=success
          step.execution step_name=route outcome=success
            handler.execution
            result.submission
            step.state_transition event=Claim
            step.state_transition event=Complete
            step.state_transition event=Enqueue
            step.state_transition event=Report
            step.wait
          step.state_transition event=Skip
          step.state_transition event=Skip
          step.state_transition event=Skip
    ",
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_chain_behind_a_skipped_step_is_skipped_at_once() {
    let world = World::start(Setup::default()).await;
    let mut yaml = String::from(
        "steps:\n  - {name: s0, handler: ok}\n  - {name: s1, handler: ok, depends_on: [s0], when: '${input.go} is present', input: {}}\n",
    );
    for n in 2..3000 {
        use std::fmt::Write as _;
        let _ = writeln!(yaml, "  - {{name: s{n}, handler: ok, depends_on: [s{}], input: {{}}}}", n - 1);
    }
    world.register("long", &yaml).await;
    let task = world.submit("long").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert_eq!(world.number("select count(*) from tasker.steps where state = 'skipped'").await, 2999);
    assert_eq!(
        world.number("select count(distinct at) from tasker.transitions where event = 'Skip'").await,
        1,
        "in one go"
    );
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}
