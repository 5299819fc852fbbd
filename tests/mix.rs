//! A mix of everything that Tasker can do: what the storm and the proof of the trace are made of.

use std::time::Duration;

use serde_json::{Value, json};
use tasker_shared::client::Client;
use tasker_shared::schedule::{Missed, Schedule};
use tasker_shared::state_machine::decide::ByHand;
use tasker_shared::store::flow::SetLimit;
use tasker_shared::store::requests::TaskRequest;
use tasker_tests::worker::{self, Answer, Claim, NAMESPACE, answer};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::harness::{DEADLINE, Setup, World, eventually};

/// Name, the rest of the YAML, the input, and how a task of it ends once [`submit_mix`] has done
/// what operators do to it.
pub type Feature = (&'static str, &'static str, Value, &'static str);

/// One of each.
pub fn features() -> Vec<Feature> {
    vec![
        ("branching", BRANCHING, json!({"side": "left", "total": 7}), "complete"),
        ("mapping", MAPPING, json!({"items": [1, 2, 3, 4, 5, 6, 7, 8, 9]}), "complete"),
        ("waiting", WAITING, json!({"at": "2026-01-01T00:00:00Z"}), "complete"),
        ("limited", LIMITED, json!({"customer": "c1", "tenant": "acme"}), "complete"),
        ("going_on", GOING_ON, json!({}), "complete"),
        ("failing", FAILING, json!({}), "error"),
        ("nesting", NESTING, json!({"items": [1, 2, 3]}), "complete"),
        ("large", LARGE, json!({"text": "x".repeat(100_000)}), "complete"),
        ("timed", TIMED, json!({}), "complete"),
        ("out_of_time", OUT_OF_TIME, json!({}), "error"),
        ("versioned", VERSIONED, json!({}), "complete"),
        ("settled", SETTLED, json!({}), "complete"),
        ("given_up", BLOCKED, json!({}), "error"),
        ("resolved", BLOCKED, json!({}), "resolved_manually"),
        ("unblocked", UNBLOCKED, json!({}), "complete"),
        ("retried", RETRIED, json!({}), "complete"),
        ("rerun", RERUN, json!({}), "complete"),
        ("cancelled", ENDLESS, json!({}), "cancelled"),
        ("terminated", ENDLESS, json!({}), "cancelled"),
    ]
}

const BRANCHING: &str = "
steps:
  - {name: route, handler: echo, branches: [left, right], input: {branch: '${input.side}'}}
  - {name: left, handler: flaky, depends_on: [route], retry: {initial_interval: 10ms}}
  - {name: right, handler: ok, depends_on: [route]}
  - {name: dear, handler: ok, depends_on: [route], when: '${input.total} > 100'}
  - {name: first, handler: ok, depends_on: [left, right, dear], join: any}
  - {name: end, handler: ok, depends_on: [left, right, dear], join: taken}
";

const MAPPING: &str = "
steps:
  - {name: each, handler: flaky, for_each: '${input.items}', max_parallel: 4, input: {n: '${item}'}, retry: {initial_interval: 10ms}}
  - {name: lenient, handler: broken, for_each: '${input.items}', max_parallel: 3, on_item_failure: continue, input: {n: '${item_index}'}}
  - {name: sum, handler: ok, depends_on: [each, lenient], input: {all: '${steps.each.output}', none: '${steps.lenient.output}'}}
";

const WAITING: &str = "
steps:
  - {name: nap, wait: {sleep: 30ms}}
  - {name: opening, wait: {until: '${input.at}'}}
  - {name: nobody, wait: {signal: nobody, timeout: 50ms, on_timeout: continue}}
  - {name: approval, wait: {signal: approved, allowed: [yes_please, no_thanks]}, depends_on: [nap]}
  - {name: act, handler: ok, depends_on: [approval, opening, nobody], input: {answer: '${steps.approval.output.answer}'}}
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
fair_key: '${input.tenant}'
steps:
  - {name: a, handler: ok, priority: 3, concurrency: {key: '${input.customer}', limit: 2}}
  - {name: b, handler: flaky, depends_on: [a], concurrency: {key: '${input.customer}', limit: 2}, retry: {initial_interval: 10ms}}
  - {name: c, handler: ok, depends_on: [a], rate: {limit: 4, per: 200ms, key: '${input.tenant}'}}
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

/// `ignored` is offered and never claimed; `silent` is claimed and not heard of again; `later` says
/// itself when to try it again, and tells its progress.
const TIMED: &str = "
timeouts: {total: 1h}
steps:
  - {name: queue, handler: ignored, timeouts: {queue: 100ms}, retry: {on_exhausted: continue}}
  - {name: run, handler: sleep, input: {ms: 600000}, timeouts: {run: 50ms}, retry: {max_attempts: 2, initial_interval: 10ms, on_exhausted: continue}}
  - {name: total, handler: sleep, input: {ms: 600000}, timeouts: {run: 1h, total: 300ms}, retry: {on_exhausted: continue}}
  - {name: lease, handler: silent, timeouts: {heartbeat: 1s}}
  - {name: later, handler: later, retry: {initial_interval: 1h, max_interval: 1h}}
  - {name: end, handler: ok, depends_on: [queue, run, total, lease, later], input: {}}
";

const OUT_OF_TIME: &str = "
timeouts: {total: 300ms}
steps:
  - {name: a, handler: ok}
  - {name: nap, wait: {sleep: 1h}}
  - {name: child, task: {template: sleeper}, input: {}}
";

const VERSIONED: &str = "
steps:
  - {name: a, handler: ok}
  - {name: only_in_the_first, handler: ok, depends_on: [a]}
";

const VERSION_TWO: &str = "
steps:
  - {name: a, handler: flaky, retry: {initial_interval: 10ms}}
";

/// Each of the three is settled in another way, and what follows reads what was given.
const SETTLED: &str = "
steps:
  - {name: a, handler: broken, retry: {on_exhausted: block}}
  - {name: b, handler: broken, retry: {on_exhausted: block}}
  - {name: c, handler: broken, retry: {on_exhausted: block}}
  - {name: d, handler: ok, depends_on: [a, b, c], input: {a: '${steps.a.output.n}', b: '${steps.b.output}', c: '${steps.c.output.n}'}}
";

const BLOCKED: &str = "
on_failure: block
steps:
  - {name: a, handler: broken}
  - {name: b, handler: ok, depends_on: [a]}
  - {name: c, handler: ok}
";

/// Its first attempt fails, and no other is left.
const UNBLOCKED: &str = "
on_failure: block
steps:
  - {name: a, handler: flaky, retry: {max_attempts: 1}}
  - {name: b, handler: ok, depends_on: [a]}
";

const RETRIED: &str = "
steps:
  - {name: a, handler: ok}
  - {name: b, handler: flaky, depends_on: [a], retry: {max_attempts: 1}}
  - {name: c, handler: ok, depends_on: [b]}
";

const RERUN: &str = "
steps:
  - {name: a, handler: ok}
  - {name: b, handler: ok, depends_on: [a]}
  - {name: child, task: {template: one}, depends_on: [b]}
  - {name: c, handler: ok, depends_on: [child]}
";

const ENDLESS: &str = "
steps:
  - {name: runs, handler: sleep, input: {ms: 3600000}, timeouts: {run: 1h}, concurrency: {limit: 2}}
  - {name: waits, wait: {signal: never}}
  - {name: child, task: {template: sleeper}, input: {}}
";

/// What the log must tell of at the end, or the mix had something less in it than it claims.
pub const SEEN: &[(&str, &str)] = &[
    ("steps that were skipped", "select count(*) from tasker.transitions where event = 'Skip' and actor is null"),
    ("items of maps", "select count(*) from tasker.steps where item >= 0"),
    ("attempts that were tried again", "select count(*) from tasker.attempts where attempt > 1"),
    ("attempts that were lost", "select count(*) from tasker.transitions where event = 'LeaseExpired'"),
    ("timeouts in the queue", "select count(*) from tasker.transitions where event = 'QueueTimeout'"),
    ("timeouts of handlers", "select count(*) from tasker.attempts where error->>'type' = 'timeout'"),
    (
        "steps out of time",
        "select count(*) from tasker.transitions where event = 'TotalTimeout' and entity_uuid <> task_uuid and to_state = 'error'",
    ),
    (
        "tasks out of time",
        "select count(*) from tasker.transitions where event = 'TotalTimeout' and entity_uuid = task_uuid",
    ),
    ("blocked tasks", "select count(*) from tasker.transitions where to_state = 'blocked_by_failures'"),
    ("timers", "select count(*) from tasker.transitions where event = 'TimerFired' and entity_uuid <> task_uuid"),
    ("signals", "select count(*) from tasker.transitions where event = 'SignalReceived'"),
    ("nested tasks", "select count(*) from tasker.tasks where parent_task_uuid is not null"),
    ("suspensions", "select count(*) from tasker.transitions where event = 'Suspend'"),
    ("resumptions", "select count(*) from tasker.transitions where event = 'Resume'"),
    ("cancellations", "select count(*) from tasker.transitions where event = 'Cancel' and entity_uuid = task_uuid"),
    ("terminations", "select count(*) from tasker.transitions where event = 'Terminate' and entity_uuid = task_uuid"),
    ("retries of what failed", "select count(*) from tasker.transitions where event = 'OperatorRetry'"),
    ("second generations", "select count(*) from tasker.transitions where event = 'Rerun' and entity_uuid = task_uuid"),
    ("steps done by hand", "select count(*) from tasker.transitions where event = 'CompleteManually'"),
    ("steps resolved by hand", "select count(*) from tasker.transitions where event = 'ResolveManually'"),
    ("steps skipped by hand", "select count(*) from tasker.transitions where event = 'Skip' and actor is not null"),
    ("tasks given up", "select count(*) from tasker.transitions where event = 'GiveUp'"),
    (
        "acts in the audit for each of a task by hand",
        "select (count(distinct action) >= 8)::int::bigint from tasker.audit where task_uuid is not null",
    ),
    (
        "steps held by a limit",
        "select count(*) from tasker.transitions where detail->'waits' @> '[{\"reason\": \"limit\"}]'",
    ),
    (
        "steps held by a pause",
        "select count(*) from tasker.transitions where detail->'waits' @> '[{\"reason\": \"paused\"}]'",
    ),
    ("tasks of a schedule", "select count(*) from tasker.tasks where correlation_id like 'tests/ticking@%'"),
    (
        "tasks of both versions",
        "select count(distinct p.version) - 1 from tasker.tasks t join tasker.templates p using (template_id) where p.name = 'versioned'",
    ),
];

/// So many orchestrators and Rust workers, and one worker that speaks SQL and falls silent.
pub fn setup(orchestrators: usize, rust_workers: usize) -> Setup {
    let work = |claim: &Claim| match (&*claim.handler, claim.attempt) {
        ("silent", 2..) => Answer::Success(json!({"heard": "again"})),
        _ => answer(claim),
    };
    Setup { orchestrators, rust_workers, workers: 1, work: std::sync::Arc::new(work), ..Setup::default() }
}

/// Registers what the mix is made of, and sets its schedules and limits.
pub async fn register_mix(world: &World, features: &[Feature]) {
    world.register_steps("chain", "a: ok\nb: flaky <- a\nc: ok <- b").await;
    world.register_steps("one", "a: ok").await;
    world.register("sleeper", "steps: [{name: nap, wait: {sleep: 1h}}]").await;
    world.register_as("forgotten", "brief", "1", "steps: [{name: nap, wait: {sleep: 10ms}}]").await;
    for (name, yaml, ..) in features {
        world.register(name, yaml).await;
    }
    let client = Client::from_pool(world.pool.clone());
    let at = json!({"at": "${schedule.at}"});
    let ticks =
        |name: &str| Schedule { missed: Missed::RunAll, input: at.clone(), ..Schedule::new(NAMESPACE, name, "one") };
    let soon = chrono::Utc::now() + chrono::TimeDelta::seconds(2);
    for schedule in [
        Schedule { every: Some("1s".into()), ..ticks("ticking") },
        Schedule { cron: Some("*/2 * * * * *".into()), time_zone: Some("Europe/Paris".into()), ..ticks("by_cron") },
        Schedule { once_at: Some(soon), ..ticks("once") },
    ] {
        client.set_schedule(&schedule, Some("the mix")).await.expect("set");
    }
    let of_handler =
        SetLimit { namespace: NAMESPACE.into(), handler: Some("later".into()), concurrency: Some(3), rate: None };
    client.set_limit(&of_handler, Some("the mix"), None).await.expect("limited");
    client.set_retention("forgotten", Some(Duration::from_hours(1)), None, true, Some("the mix")).await.expect("set");
}

/// Suspends a task that has not ended yet; whether it will be suspended.
async fn suspend(world: &World, task: Uuid) -> bool {
    let act = sqlx::query_scalar("select tasker.suspend_task($1, 'a moment')");
    act.bind(task).fetch_one(&world.pool).await.ok().is_some_and(|answer: String| answer == "accepted")
}

/// Lets a task go on as soon as it is suspended, unless it ended before.
async fn resume(world: &World, task: Uuid) {
    eventually("it is suspended or has ended", async || {
        let act = sqlx::query_scalar("select tasker.resume_task($1, 'go on')").bind(task);
        let answer: String = act.fetch_one(&world.pool).await.expect("asked");
        (answer == "accepted" || world.of_task(task, "finished_at::text").await.is_some()).then_some(())
    })
    .await;
}

/// Answers the approval of a waiting task; some answers come before it waits, or runs at all.
async fn approve(world: &World, task: Uuid) {
    for (payload, expected) in [(r#"{"answer": "maybe"}"#, false), (r#"{"answer": "yes_please"}"#, true)] {
        let ask = sqlx::query_scalar("select tasker.signal_task($1, 'approved', $2::jsonb)").bind(task).bind(payload);
        let said: String = ask.fetch_one(&world.pool).await.expect("asked");
        assert_eq!(said == "accepted", expected, "{payload}: {said}");
    }
}

/// Submits so many tasks of all features; signals, suspends and resumes some of them; pauses the
/// queue and limits the namespace for a while; then does what the operators of such tasks do.
pub async fn submit_mix(world: &World, features: &[Feature], count: usize) -> Vec<Uuid> {
    let client = Client::from_pool(world.pool.clone());
    let queue = format!("worker_{NAMESPACE}");
    let (mut tasks, mut suspended) = (Vec::new(), Vec::new());
    for n in 0..count {
        let (name, _, input, _) = &features[n % features.len()];
        if n == count / 4 {
            client.pause_queue(&queue, Some("the mix"), Some("a break")).await.expect("paused");
            let limit = SetLimit { namespace: NAMESPACE.into(), handler: None, concurrency: Some(12), rate: None };
            client.set_limit(&limit, Some("the mix"), None).await.expect("limited");
        }
        if n == count / 2 {
            let held = "select count(*) from tasker.steps where held_by = 'paused'";
            eventually("something is held", async || (world.number(held).await > 0).then_some(())).await;
            client.resume_queue(&queue, Some("the mix"), None).await.expect("resumed");
            world.register_as(NAMESPACE, "versioned", "2", VERSION_TWO).await;
        }
        let request = json!({"template": name, "input": input, "priority": n % 3});
        let task = world.submit_with(request).await.expect("submitted");
        if *name == "waiting" {
            approve(world, task).await;
        }
        if n % 7 == 3 && suspend(world, task).await {
            suspended.push(task);
        }
        tasks.push(task);
    }
    for task in suspended {
        resume(world, task).await;
    }
    client.remove_limit((NAMESPACE, None), Some("the mix"), None).await.expect("no limit any more");
    client.trigger_schedule((NAMESPACE, "once"), Some("the mix"), None).await.expect("triggered");
    operate(world, &client, features, &tasks).await;
    forget(world, count.div_ceil(features.len())).await;
    tasks
}

/// Repairs, gives up, cancels: until each of those tasks is where it stays.
async fn operate(world: &World, client: &Client, features: &[Feature], tasks: &[Uuid]) {
    let of = |names: &[&str]| -> Vec<(&'static str, Uuid)> {
        let named = tasks.iter().enumerate().map(|(n, task)| (features[n % features.len()].0, *task));
        named.filter(|(name, _)| names.contains(name)).collect()
    };
    let (by, why) = (Some("the mix"), Some("it is in the mix"));
    let broken = of(&["settled", "given_up", "resolved", "unblocked", "retried", "rerun"]);
    let uuids: Vec<Uuid> = broken.iter().map(|(_, task)| *task).collect();
    let states = world.finish_within(&uuids, DEADLINE * 60).await;
    for ((name, task), state) in broken.iter().zip(&states) {
        let (task, steps) = (*task, |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        let done = match (*name, &**state) {
            ("settled", "blocked_by_failures") => {
                let output = |n: i32| Some(json!({"n": n}));
                client.settle_step(task, "a", ByHand::Complete, output(1), by, why).await.expect("asked");
                client.settle_step(task, "b", ByHand::Skip, None, by, why).await.expect("asked");
                client.settle_step(task, "c", ByHand::Resolve, output(3), by, why).await
            }
            ("given_up", "blocked_by_failures") => client.act(task, TaskRequest::GiveUp, by, why).await,
            ("resolved", "blocked_by_failures") => client.act(task, TaskRequest::Resolve, by, why).await,
            ("unblocked", "blocked_by_failures") => client.retry_steps(task, &steps(&["a"]), by, why).await,
            ("retried", "error") => client.retry(task, by, why).await,
            // Its worker was killed in the attempt that would have failed.
            ("unblocked", "complete") => continue,
            ("retried" | "rerun", "complete") => client.rerun(task, &steps(&["b"]), by, why).await,
            _ => panic!("a task of {name} is {state}"),
        };
        done.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    // Many at once: first to see how many there are.
    let filter = json!({"namespace": NAMESPACE, "template": "cancelled"});
    let cancelled = of(&["cancelled"]).len();
    for dry_run in [true, false] {
        let answer = client.act_on_tasks(&filter, "cancel", dry_run, by, why).await.expect("asked");
        assert_eq!(answer["matched"], json!(cancelled), "{answer}");
    }
    for (_, task) in of(&["terminated"]) {
        client.terminate(task, by, why).await.expect("asked");
    }
    let query =
        "select count(*) from tasker.tasks where task_uuid = any($1) and (finished_at is null or generation < $2)";
    for (names, generation) in [
        (&["settled", "given_up", "resolved", "unblocked", "cancelled", "terminated"][..], 1),
        (&["retried", "rerun"], 2),
    ] {
        let those: Vec<Uuid> = of(names).into_iter().map(|(_, task)| task).collect();
        let ended = async || {
            let open = sqlx::query_scalar::<_, i64>(query).bind(&those).bind(generation);
            (open.fetch_one(&world.pool).await.expect("a number") == 0).then_some(())
        };
        crate::harness::eventually_within(DEADLINE * 10, "what operators asked for is done", ended).await;
    }
}

/// Tasks of another namespace, unsampled, that retention archives and removes meanwhile.
async fn forget(world: &World, count: usize) {
    let mut tasks = Vec::new();
    for n in 0..count {
        let traceparent = format!("00-{n:032x}-{n:016x}-00", n = n + 1);
        let request = json!({"namespace": "forgotten", "template": "brief", "traceparent": traceparent});
        tasks.push(world.submit_with(request).await.expect("submitted"));
    }
    world.finish_within(&tasks, DEADLINE * 60).await;
    crate::retention::age(world, &tasks, 30).await;
    let folder = tempfile::tempdir().expect("a folder");
    let (file, stop) = (folder.path().join("archive.jsonl"), CancellationToken::new());
    crate::harness::eventually_within(DEADLINE * 10, "they are forgotten", async || {
        tasker_orchestration::retention::pass(&world.pool, Some(&file), Duration::ZERO, &stop).await.expect("a pass");
        let left = "select count(*) from tasker.tasks where namespace = 'forgotten'";
        (world.number(left).await == 0).then_some(())
    })
    .await;
    let archive = std::fs::read_to_string(&file).expect("the archive");
    assert_eq!(archive.lines().count(), count, "each is archived once");
}

/// Ends the schedules of the mix, once its tasks have ended. Each tick has run once, none is missing.
pub async fn wind_up(world: &World) {
    // What nobody claims lies in the queue, though its step has ended long ago.
    let mut conn = world.pool.acquire().await.expect("a connection");
    let late = worker::claim(&mut conn, "latecomer", None, &[worker::IGNORED], 1000).await.expect("claimed");
    assert!(late.is_empty(), "their time in the queue was over: {late:?}");
    drop(conn);
    let client = Client::from_pool(world.pool.clone());
    for (name, at_least) in [("ticking", 3), ("by_cron", 2), ("once", 2)] {
        let runs = async || client.schedule(NAMESPACE, name).await.expect("read").expect("there").runs;
        eventually(name, async || (runs().await >= at_least).then_some(())).await;
        client.pause_schedule((NAMESPACE, name), true, Some("the mix"), None).await.expect("paused");
        let query = "select count(*), count(distinct correlation_id),
               count(*) filter (where at - before not in (interval '1 s', interval '2 s')),
               count(distinct at - before)
             from (select correlation_id, at, lag(at) over (order by at) as before
               from (select correlation_id, split_part(correlation_id, '@', 2)::timestamptz as at
                 from tasker.tasks where correlation_id like 'tests/' || $1 || '@%') t) t";
        let seen: (i64, i64, i64, i64) =
            sqlx::query_as(query).bind(name).fetch_one(&world.pool).await.expect("tasks of the schedule");
        let runs = runs().await;
        assert_eq!((seen.0, seen.1), (runs, runs), "{name}: each tick is one task");
        if name != "once" {
            assert_eq!((seen.2, seen.3), (0, 1), "{name}: no tick is missing");
        }
    }
}
