//! Everything at once, while orchestrators and workers are killed: each feature keeps its promise,
//! nothing is lost, stuck or orphaned.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{DEADLINE, Setup, World, storm};

/// Name, the rest of the YAML, the input, and how a task of it ends when nobody meddles.
pub type Feature = (&'static str, &'static str, Value, &'static str);

/// One of each.
pub fn features() -> Vec<Feature> {
    vec![
        ("branching", BRANCHING, json!({"side": "left", "total": 7}), "complete"),
        ("mapping", MAPPING, json!({"items": [1, 2, 3, 4, 5, 6, 7, 8, 9]}), "complete"),
        ("waiting", WAITING, json!({}), "complete"),
        ("limited", LIMITED, json!({"customer": "c1"}), "complete"),
        ("going_on", GOING_ON, json!({}), "complete"),
        ("failing", FAILING, json!({}), "error"),
        ("nesting", NESTING, json!({"items": [1, 2, 3]}), "complete"),
        ("large", LARGE, json!({"text": "x".repeat(100_000)}), "complete"),
    ]
}

const BRANCHING: &str = "
steps:
  - {name: route, handler: echo, branches: [left, right], input: {branch: '${input.side}'}}
  - {name: left, handler: flaky, depends_on: [route], retry: {initial_interval: 10ms}}
  - {name: right, handler: ok, depends_on: [route]}
  - {name: dear, handler: ok, depends_on: [route], when: '${input.total} > 100'}
  - {name: end, handler: ok, depends_on: [left, right, dear], join: taken}
";

const MAPPING: &str = "
steps:
  - {name: each, handler: flaky, for_each: '${input.items}', max_parallel: 4, input: {n: '${item}'}, retry: {initial_interval: 10ms}}
  - {name: sum, handler: ok, depends_on: [each], input: {all: '${steps.each.output}'}}
";

const WAITING: &str = "
steps:
  - {name: nap, wait: {sleep: 30ms}}
  - {name: approval, wait: {signal: approved, allowed: [yes_please, no_thanks]}, depends_on: [nap]}
  - {name: act, handler: ok, depends_on: [approval], input: {answer: '${steps.approval.output.answer}'}}
";

const NESTING: &str = "
steps:
  - {name: before, handler: ok}
  - {name: child, task: {template: chain, await: true}, depends_on: [before]}
  - {name: forgotten, task: {template: one, await: false}, depends_on: [before]}
  - {name: each, for_each: '${input.items}', task: {template: one}, depends_on: [before], input: {n: '${item}'}}
  - {name: after, handler: ok, depends_on: [child, each], input: {got: '${steps.child.output.c}', all: '${steps.each.output}'}}
";

const LIMITED: &str = "
steps:
  - {name: a, handler: ok, concurrency: {key: '${input.customer}', limit: 2}}
  - {name: b, handler: flaky, depends_on: [a], concurrency: {key: '${input.customer}', limit: 2}, retry: {initial_interval: 10ms}}
";

const GOING_ON: &str = "
steps:
  - {name: a, handler: broken, retry: {on_exhausted: continue}}
  - {name: b, handler: ok, depends_on: [a], input: {}}
";

const FAILING: &str = "
steps:
  - {name: a, handler: ok}
  - {name: b, handler: broken, depends_on: [a]}
  - {name: c, handler: ok, depends_on: [b]}
";

const LARGE: &str = "
steps:
  - {name: big, handler: echo, input: {text: '${input.text}'}}
  - {name: reads, handler: echo, depends_on: [big], input: {text: '${steps.big.output.text}'}}
  - {name: reads_too, handler: echo, depends_on: [big], input: {text: '${steps.big.output.text}'}}
";

/// Suspends a task that has not ended yet; whether it will be suspended.
async fn suspend(world: &World, task: Uuid) -> bool {
    let act = sqlx::query_scalar("select tasker.suspend_task($1, 'a moment')");
    act.bind(task).fetch_one(&world.pool).await.ok().is_some_and(|answer: String| answer == "accepted")
}

/// Lets a task go on as soon as it is suspended, unless it ended before.
async fn resume(world: &World, task: Uuid) {
    crate::harness::eventually("it is suspended or has ended", async || {
        let act = sqlx::query_scalar("select tasker.resume_task($1, 'go on')").bind(task);
        let answer: String = act.fetch_one(&world.pool).await.expect("asked");
        (answer == "accepted" || world.of_task(task, "finished_at::text").await.is_some()).then_some(())
    })
    .await;
}

/// Kills a process of each kind in turn, as soon as so many moves were made since the last kill.
pub async fn kill_until(world: &World, moves: i64, done: &AtomicBool) -> usize {
    let (mut orchestrators, mut workers, mut killed) = (Vec::new(), Vec::new(), 0);
    for n in 0..2 {
        orchestrators.push(world.orchestrator_process().await);
        workers.push(world.crew_process(&format!("crew-{n}")).await);
    }
    while !done.load(Ordering::Relaxed) {
        let before = world.number("select count(*) from tasker.transitions").await;
        let (mut seen, mut until) = (before, tokio::time::Instant::now() + DEADLINE);
        while seen < before + moves && !done.load(Ordering::Relaxed) {
            let now = world.number("select count(*) from tasker.transitions").await;
            // However slowly: the last tasks make fewer moves than there are between two kills.
            if now > seen {
                (seen, until) = (now, tokio::time::Instant::now() + DEADLINE);
            }
            assert!(tokio::time::Instant::now() < until, "nothing moves after {killed} kills");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        if killed % 2 == 0 {
            orchestrators.remove(0).kill().await;
            orchestrators.push(world.orchestrator_process().await);
        } else {
            workers.remove(0).kill().await;
            workers.push(world.crew_process(&format!("crew-{}", killed + 2)).await);
        }
        killed += 1;
    }
    for process in orchestrators.into_iter().chain(workers) {
        process.kill().await;
    }
    killed
}

/// Submits so many tasks of all features, and signals, suspends and resumes some of them.
pub async fn submit_mix(world: &World, features: &[Feature], count: usize) -> Vec<Uuid> {
    let (mut tasks, mut suspended) = (Vec::new(), Vec::new());
    for n in 0..count {
        let (name, _, input, _) = &features[n % features.len()];
        let task = world.submit_with(json!({"template": name, "input": input})).await.expect("submitted");
        if *name == "waiting" {
            // Some signals come before the task has begun to wait, or to run at all.
            let answer: String =
                sqlx::query_scalar("select tasker.signal_task($1, 'approved', '{\"answer\": \"yes_please\"}')")
                    .bind(task)
                    .fetch_one(&world.pool)
                    .await
                    .expect("asked");
            assert_eq!(answer, "accepted");
        }
        if n % 7 == 3 && suspend(world, task).await {
            suspended.push(task);
        }
        tasks.push(task);
    }
    for task in suspended {
        resume(world, task).await;
    }
    tasks
}

/// Registers what the mix is made of.
pub async fn register_mix(world: &World, features: &[Feature]) {
    world.register_steps("chain", "a: ok\nb: flaky <- a\nc: ok <- b").await;
    world.register_steps("one", "a: ok").await;
    for (name, yaml, ..) in features {
        world.register(name, yaml).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mix_of_every_feature_survives_the_killing_of_both_kinds_of_process() {
    let mut world = World::start(Setup { orchestrators: 0, workers: 0, rust_workers: 1, ..Setup::default() }).await;
    let features = features();
    register_mix(&world, &features).await;
    let done = AtomicBool::new(false);
    let work = async {
        let tasks = submit_mix(&world, &features, storm(features.len() * 8, features.len() * 80)).await;
        let states = world.finish_within(&tasks, DEADLINE * 10).await;
        done.store(true, Ordering::Relaxed);
        (tasks, states)
    };
    let (killed, (tasks, states)) = tokio::join!(kill_until(&world, 150, &done), work);
    assert!(killed >= 4, "only {killed} processes were killed under load");
    for (n, (task, state)) in tasks.iter().zip(&states).enumerate() {
        let (name, _, _, expected) = &features[n % features.len()];
        let reason = world.of_task(*task, "reason").await;
        assert_eq!(state, expected, "task {n} of {name}: {reason:?}");
    }
    // Whoever comes next delivers what the dead ones owed, and ends what was started and forgotten.
    world.add_orchestrator().await;
    let all = "select count(*) from tasker.tasks where finished_at is null";
    crate::harness::eventually("every nested task has ended", async || (world.number(all).await == 0).then_some(()))
        .await;
    world.queues_drained().await;
    world.assert_complete().await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.end().await;
}
