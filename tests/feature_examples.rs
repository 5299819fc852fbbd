//! Every example of a feature is a good template, names built-in handlers only, and runs to a sound
//! trace: in the test kit, and with two orchestrators and two workers.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tasker_shared::client::{Client, Submit};
use tasker_shared::schedule::Schedule;
use tasker_shared::state_machine::decide::ByHand;
use tasker_shared::store::requests::TaskRequest;
use tasker_shared::template;
use tasker_testing::{Harness, MockError, Run};
use tasker_testing::{Rules, Trace, assert_trace};
use tasker_tests::worker::NAMESPACE;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually, trace};

/// Name and text of each file.
fn examples() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/features");
    let files = std::fs::read_dir(folder).expect("the folder");
    let mut examples: Vec<(String, String)> = files
        .map(|entry| entry.expect("an entry").path())
        .map(|path| {
            let name = path.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
            (name, std::fs::read_to_string(&path).expect("a readable file"))
        })
        .collect();
    examples.sort();
    examples
}

#[test]
fn every_feature_example_lints_clean() {
    for (name, text) in examples() {
        let checked = template::parse(&name, &text).unwrap_or_else(|problems| panic!("{name}: {problems:#?}"));
        for step in checked.template.steps.iter().filter(|step| !step.handler.is_empty()) {
            let known = ["noop", "echo", "sleep", "fail"].contains(&&*step.handler);
            assert!(known, "{name}: {} is no built-in handler", step.handler);
        }
    }
}

/// Runs an example as the built-in handlers would, with an input that suits it.
fn run(name: &str, text: &str) -> Run {
    let mut harness = Harness::from_yaml(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    harness.answers("noop", Value::Null).answers("sleep", Value::Null);
    harness.handler("echo", |call| Ok(call.input.clone()));
    harness.handler("fail", |_| Err(MockError::fail("Failed", "as it was asked to")));
    harness.task("nested_payment", |call| Ok(json!({"capture": {"amount": call.input["amount"]}})));
    let input = json!({
        "amount": 12, "total": 700, "country": "de", "customer_id": "c-42", "tenant": "acme", "until": "2026-01-06T00:00:00Z",
        "rows": {"rows": [1]}, "by": "me", "parcels": ["a", "b"], "items": [1, 2], "pages": ["a"], "order_id": "4711",
        "kind": "parcel", "route": "express", "at": "2026-01-06T00:00:00Z", "orders": [{"id": 1}], "weights": [1, 2], "urls": ["a"], "ms": 5,
    });
    let mut task = harness.start(input);
    match name {
        "approval" => {
            task.advance(Duration::from_hours(47)).signal("approved", json!({"answer": "approve"}));
        }
        "signal" => {
            task.signal("paid", json!({"amount": 12}));
        }
        "repair" => {
            task.complete_step("charge", json!({"receipt": "R-1"}));
        }
        _ => {}
    }
    task.finish()
}

#[test]
fn every_feature_example_runs_and_its_trace_is_sound() {
    for (name, text) in examples() {
        let run = run(&name, &text);
        assert_eq!(run.status(), "completed", "{name}: {:?}", run.reason());
        Rules::new().well_formed().assert(&Trace::of_log(&run.log()));
    }
}

#[test]
fn the_trace_of_a_run_in_the_test_kit_can_be_asserted() {
    let (name, text) = examples().into_iter().find(|(name, _)| name == "repair").expect("the example");
    let trace = Trace::of_log(&run(&name, &text).log());
    assert_trace!(trace, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "charge", outcome = "failure"],
            "step.state_transition" [event = "CompleteManually", actor = "test"],
            "step.execution" [step_name = "ship", outcome = "success"],
            ..
        }
    });
}

/// A world in which every example is registered, all in the namespace of the tests.
async fn world() -> World {
    let world = World::start(Setup { orchestrators: 2, workers: 0, rust_workers: 2, ..Setup::default() }).await;
    let mut registered = Vec::new();
    // Another is named by the one that starts it, so it comes first.
    for (name, text) in examples().into_iter().rev() {
        let (head, steps) = text.split_once("version:").expect("a version");
        let version = steps.split('"').nth(1).expect("in quotes").to_owned();
        let rest = steps.split_once('\n').expect("more than a version").1;
        let own = head.lines().find_map(|line| line.strip_prefix("name: ")).expect("a name");
        world.register_as(NAMESPACE, own, &version, rest).await;
        registered.push(name);
    }
    assert!(registered.len() >= 17, "{registered:?}");
    world
}

/// Submits a task of an example.
async fn submit(world: &World, name: &str, input: Value) -> Uuid {
    world.submit_with(json!({"template": name, "input": input})).await.unwrap_or_else(|why| panic!("{name}: {why}"))
}

/// The trace of a task, once it has ended like this and all of them have arrived.
async fn ended(world: &World, task: Uuid, state: &str) -> Trace {
    let expected = "select count(*) from tasker.export_batches";
    assert_eq!(world.finish(&[task]).await, [state], "{:?}", world.of_task(task, "reason").await);
    eventually("its spans have arrived", async || (world.number(expected).await == 0).then_some(())).await;
    let of: Vec<u8> = world.spans_of(task).pop().expect("a span").span.trace_id;
    trace(&world.receiver.spans().into_iter().filter(|span| span.span.trace_id == of).collect::<Vec<_>>())
}

async fn what_is_chosen_mapped_and_timed(world: &World) {
    let task = submit(world, "branches", json!({"route": "express", "total": 7})).await;
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "route"],
            "step.execution" [step_name = "express"],
            "step.execution" [step_name = "label"],
            "step.state_transition" * 2 [event = "Skip", to_state = "skipped"],
            ..
        }
    });

    let task = submit(world, "map", json!({"items": ["a", "b", "c"]})).await;
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "each", step_index = 0],
            "step.execution" [step_name = "each", step_index = 1],
            "step.execution" [step_name = "each", step_index = 2],
            "step.wait" ["wait.reason" = "items"],
            "step.execution" [step_name = "collect"],
            ..
        }
    });

    let task = submit(world, "timeouts", json!({"ms": 60_000})).await;
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "slow", attempt_number = 1, outcome = "timeout", "error.type" = "timeout"],
            "step.execution" [step_name = "slow", attempt_number = 2, outcome = "timeout", "error.type" = "timeout"],
            "step.wait" ["wait.reason" = "retry"],
            "step.execution" [step_name = "report", outcome = "success"],
            ..
        }
    });
}

async fn what_waits(world: &World, client: &Client) {
    let by = Some("ann");
    let task = submit(world, "sleep", json!({"at": "2026-01-06T00:00:00Z"})).await;
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.wait" * 2 ["wait.reason" = "timer"],
            "step.execution" [step_name = "remind"],
            ..
        }
    });

    let task = submit(world, "signal", json!({})).await;
    client.signal(task, "paid", &json!({"amount": 12}), by).await.expect("sent");
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.wait" ["wait.reason" = "signal", actor = "ann"],
            "step.execution" [step_name = "book"],
            ..
        }
    });

    let task = submit(world, "approval", json!({})).await;
    let refused = client.signal(task, "approved", &json!({"answer": "perhaps"}), by).await.unwrap_err().to_string();
    assert!(refused.contains("approve, reject"), "{refused}");
    client.signal(task, "approved", &json!({"answer": "approve"}), by).await.expect("sent");
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.wait" ["wait.reason" = "signal", actor = "ann"],
            "step.execution" [step_name = "act"],
            ..
        }
    });

    let task = submit(world, "nested", json!({"total": 12, "parcels": ["a", "b"]})).await;
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "pay", outcome = "success"] {
                "task.orchestration" [task_name = "nested_payment", outcome = "success"] {
                    "step.execution" [step_name = "reserve"],
                    "step.execution" [step_name = "capture"],
                    ..
                },
                ..
            },
            "step.execution" * 2 [step_name = "parcels", outcome = "success"] {
                "task.orchestration" [task_name = "nested_payment", outcome = "success"],
                ..
            },
            "step.execution" [step_name = "receipt"],
            ..
        }
    });
}

async fn what_a_person_stops(world: &World, client: &Client) {
    let (by, why) = (Some("ann"), Some("it is an example"));
    // Stopped for a while, then ended in good order.
    let task = submit(world, "cancel", json!({"ms": 600_000})).await;
    eventually("it runs", async || world.steps(task).await.contains(&"export: in_progress".into()).then_some(())).await;
    client.act(task, TaskRequest::Suspend, by, why).await.expect("asked");
    let suspended = async || (world.of_task(task, "state").await.as_deref() == Some("suspended")).then_some(());
    eventually("it is suspended", suspended).await;
    client.act(task, TaskRequest::Resume, by, why).await.expect("asked");
    eventually("it goes on", async || suspended().await.is_none().then_some(())).await;
    client.cancel(task, by, why).await.expect("asked");
    assert_trace!(ended(world, task, "cancelled").await, {
        "task.orchestration" [outcome = "cancellation", reason = "it is an example"] {
            "task.state_transition" [event = "Suspend", actor = "ann"],
            "task.state_transition" [event = "Resume", actor = "ann"],
            "task.state_transition" [event = "Cancel", actor = "ann"],
            "step.execution" [step_name = "export", outcome = "cancellation"],
            "step.state_transition" [event = "Cancel"],
            ..
        }
    });
    let task = submit(world, "cancel", json!({"ms": 600_000})).await;
    client.terminate(task, by, why).await.expect("asked");
    assert_trace!(ended(world, task, "cancelled").await, {
        "task.orchestration" [outcome = "cancellation"] { "task.state_transition" [event = "Terminate", actor = "ann"], .. }
    });
}

async fn what_a_person_repairs(world: &World, client: &Client) {
    let (by, why) = (Some("ann"), Some("it is an example"));
    let task = submit(world, "repair", json!({})).await;
    assert_eq!(world.finish(&[task]).await, ["blocked_by_failures"]);
    let receipt = Some(json!({"receipt": "R-1"}));
    client.settle_step(task, "charge", ByHand::Complete, receipt, by, why).await.expect("asked");
    eventually("it has ended", async || world.of_task(task, "finished_at").await.map(|_| ())).await;
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "charge", outcome = "failure"],
            "step.state_transition" [event = "CompleteManually", actor = "ann"],
            "step.execution" [step_name = "ship"],
            ..
        }
    });
    // Another generation, with a root of its own beside the first.
    client.rerun(task, &["ship".to_owned()], by, why).await.expect("asked");
    let again = async || world.of_task(task, "generation").await.filter(|generation| generation == "2");
    eventually("it has begun again", again).await;
    assert_trace!(ended(world, task, "complete").await, {
        "task.orchestration" [generation = 1] { .. },
        "task.orchestration" [generation = 2, links = 1] {
            "task.state_transition" [event = "Rerun", actor = "ann"],
            "step.execution" [step_name = "ship", attempt_number = 2],
            ..
        }
    });
}

/// A task whose first step is held because its queue is paused. An orchestrator that has not heard
/// of the pause yet still sends to the queue, where nobody claims.
async fn submit_held(world: &World, template: &str, input: impl Fn(u32) -> Value) -> Uuid {
    let mut n = 0;
    eventually("a step is held because its queue is paused", async || {
        n += 1;
        let task = submit(world, template, input(n)).await;
        let held = eventually("it has begun", async || {
            sqlx::query_scalar::<_, Option<String>>(
                "select held_by from tasker.steps where task_uuid = $1 and step_index = 0",
            )
            .bind(task)
            .fetch_optional(&world.pool)
            .await
            .expect("asked")
        })
        .await;
        (held.as_deref() == Some("paused")).then_some(task)
    })
    .await
}

async fn what_is_held(world: &World, client: &Client) {
    let (by, why) = (Some("ann"), Some("it is an example"));
    // A queue that is paused holds what is limited, shared and urgent alike.
    let queue = format!("worker_{NAMESPACE}");
    client.pause_queue(&queue, by, why).await.expect("paused");
    let limited = submit_held(world, "limits", |n| json!({"customer_id": format!("c-{n}")})).await;
    let shared = submit_held(world, "fair_share", |n| json!({"tenant": format!("tenant-{n}")})).await;
    client.resume_queue(&queue, by, why).await.expect("resumed");
    assert_trace!(ended(world, limited, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "charge"],
            "step.wait" ["wait.reason" = "paused"],
            "step.execution" [step_name = "notify"],
            ..
        }
    });
    assert_trace!(ended(world, shared, "complete").await, {
        "task.orchestration" [outcome = "success"] {
            "step.execution" [step_name = "work"],
            "step.wait" ["wait.reason" = "paused"],
            ..
        }
    });
}

async fn what_is_scheduled_and_versioned(world: &World, client: &Client) {
    let (by, why) = (Some("ann"), Some("it is an example"));
    let nightly =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/schedules/nightly.yaml"));
    let mut schedule: Schedule = Schedule::from_yaml(&nightly.expect("the example")).expect("a schedule");
    NAMESPACE.clone_into(&mut schedule.namespace);
    client.set_schedule(&schedule, by).await.expect("set");
    let task = client.trigger_schedule((NAMESPACE, "nightly"), by, why).await.expect("triggered");
    let trace = ended(world, task, "complete").await;
    assert_trace!(trace, {
        "task.orchestration" [outcome = "success", task_name = "report"] {
            "step.execution" [step_name = "collect"],
            "step.execution" [step_name = "send"],
            ..
        }
    });

    for (version, steps) in [("1", 2), ("2", 3)] {
        let request = Submit { version: Some(version.into()), ..Submit::new(NAMESPACE, "versions", json!({})) };
        let task = client.submit(request).await.expect("submitted");
        let trace = ended(world, task, "complete").await;
        assert_trace!(trace, { "task.orchestration" [template_version = version] { .. } });
        assert_eq!(trace.spans.iter().filter(|span| span.name == "step.execution").count(), steps);
    }

    let rows = json!({"rows": {"rows": "x".repeat(100_000)}, "by": "me"});
    for (name, input, steps) in [("large_payload", rows, 3), ("retention", json!({}), 1)] {
        let task = submit(world, name, input).await;
        let trace = ended(world, task, "complete").await;
        assert_eq!(trace.spans.iter().filter(|span| span.name == "step.execution").count(), steps, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_feature_example_runs_with_two_of_each_and_its_trace_shows_the_feature() {
    let world = world().await;
    let client = Client::from_pool(world.pool.clone());
    what_is_chosen_mapped_and_timed(&world).await;
    what_waits(&world, &client).await;
    what_a_person_stops(&world, &client).await;
    what_a_person_repairs(&world, &client).await;
    what_is_held(&world, &client).await;
    what_is_scheduled_and_versioned(&world, &client).await;
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}
