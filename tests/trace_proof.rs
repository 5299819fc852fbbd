//! The trace is complete, at full size: minutes each, so `just trace-proof` runs them.
//!
//! `TASKER_PROOF_TASKS`, `TASKER_PROOF_OUTAGE_S`, `TASKER_PROOF_CLEAN_TASKS` and
//! `TASKER_PROOF_STEPS` change the sizes.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;
use serde_json::json;
use tasker_api::trace::read::{self, Include, Sources};
use tasker_shared::redact;
use tasker_shared::store::transitions;
use tasker_shared::telemetry::live;
use tasker_shared::trace::otlp::{self, Encoder, ServiceNames};
use tasker_shared::trace::{names, tree};
use tasker_testing::{Difference, Rules, Trace, compare};
use tasker_tests::receiver::{Behaviour, Received};
use tonic::Code;
use uuid::Uuid;

use crate::every_feature_under_kills::kill_until;
use crate::harness::{DEADLINE, Setup, World, eventually, trace};
use crate::mix::{SEEN, features, register_mix, setup, submit_mix, wind_up};

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// What `tasker trace verify` does, against what the receiver holds; a page of tasks at a time.
async fn verify(world: &World) -> (usize, Difference) {
    let mut arrived: HashMap<Vec<u8>, Vec<Received>> = HashMap::new();
    for received in world.receiver.spans() {
        arrived.entry(received.span.trace_id.clone()).or_default().push(received);
    }
    let tasks: Vec<Uuid> = sqlx::query_scalar("select task_uuid from tasker.tasks order by task_uuid")
        .fetch_all(&world.pool)
        .await
        .unwrap();
    let mut found = Difference::default();
    for page in tasks.chunks(100) {
        let logs = transitions::logs(&mut world.pool.acquire().await.unwrap(), page).await.unwrap();
        for log in logs {
            let there = arrived.get(&log.head.trace_id[..]).map(trace).unwrap_or_default();
            // A nested task is in the trace of its parent.
            let spans = Trace::of_spans(&tree::spans(&log), &ServiceNames::default());
            found.add(compare(&spans, &there));
        }
    }
    for spans in arrived.values_mut() {
        // What a killed process had sent already came again: equal to the last byte.
        let mut seen: HashMap<Vec<u8>, Received> = HashMap::new();
        spans.retain(|received| {
            let before = seen.insert(received.span.span_id.clone(), received.clone());
            assert!(
                before.as_ref().is_none_or(|first| first == received),
                "a span arrived twice with different contents"
            );
            before.is_none()
        });
        Rules::new().well_formed().links().assert(&trace(&*spans));
    }
    (tasks.len(), found)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `just trace-proof`"]
async fn nothing_is_missing_after_kills_and_an_outage_of_the_collector() {
    let count = usize::try_from(number("TASKER_PROOF_TASKS", 10_000)).unwrap();
    let outage = Duration::from_secs(number("TASKER_PROOF_OUTAGE_S", 120));
    let mut world = World::start(setup(0, 1)).await;
    let features = features();
    register_mix(&world, &features).await;
    let (done, began) = (AtomicBool::new(false), Instant::now());
    let work = async {
        let tasks = submit_mix(&world, &features, count).await;
        let states = world.finish_within(&tasks, DEADLINE * 60).await;
        wind_up(&world).await;
        done.store(true, Ordering::Relaxed);
        states
    };
    let away = async {
        let some = i64::try_from(count / 4).unwrap();
        eventually_long(async || {
            world.number("select count(*) from tasker.tasks where finished_at is not null").await >= some
        })
        .await;
        let finished = "select count(*) from tasker.tasks where finished_at is not null";
        let before = world.number(finished).await;
        world.receiver.behave(Behaviour::CloseMidStream);
        tokio::time::sleep(outage / 2).await;
        world.receiver.behave(Behaviour::Refuse(Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE));
        tokio::time::sleep(outage / 2).await;
        world.receiver.behave(Behaviour::Accept);
        world.number(finished).await - before
    };
    let every = i64::try_from(count).unwrap() / 2;
    let (killed, states, meanwhile) = tokio::join!(kill_until(&world, every.max(150), usize::MAX, &done), work, away);
    for (n, state) in states.iter().enumerate() {
        assert_eq!(*state, features[n % features.len()].3, "task {n}");
    }
    assert!(meanwhile > 0 || count < 1000, "work went on while the collector was away");
    world.add_orchestrator().await;
    let worked = began.elapsed();
    eventually_long(async || world.number("select count(*) from tasker.tasks where finished_at is null").await == 0)
        .await;
    world.queues_drained().await;
    eventually_long(async || world.number("select count(*) from tasker.export_batches").await == 0).await;
    world.assert_sound().await;
    let (tasks, found) = verify(&world).await;
    let counts: Vec<String> = found.counts().iter().map(|(name, n)| format!("{n} {name}")).collect();
    println!(
        "PROOF kills and outage: {tasks} tasks in {:.0} s, {killed} processes killed, collector away {:.0} s ({meanwhile} tasks ended meanwhile): \
         {} spans as the log has them, {}, {} equal duplicates",
        worked.as_secs_f64(),
        outage.as_secs_f64(),
        found.matched,
        counts.join(", "),
        found.duplicates
    );
    assert!(found.is_none(), "{found:#?}");
    assert_eq!(found.remote_parents_missing, 0, "nobody called from outside");
    assert!(killed >= 8 || count < 1000, "only {killed} processes were killed");
    for (what, query) in SEEN {
        let n = world.number(query).await;
        println!("PROOF   among them {n} {what}");
        assert!(n > 0 || count < 1000, "{what}");
    }
    assert_eq!(world.receiver.violations(), [""; 0]);
    world.end().await;
}

/// As `eventually`, for things that take longer than a minute.
async fn eventually_long(mut is: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + Duration::from_hours(1);
    while !is().await {
        assert!(Instant::now() < until, "it took more than an hour");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// How many spans of each name the rows of the log ask for: counted in SQL, without the tree.
const EXPECTED: &str = "
with moves as (
  select t.*, t.entity_uuid = t.task_uuid as of_task from tasker.transitions t
), names as (
  select task_uuid, 'task.state_transition' as name, count(*) as n from moves where of_task group by 1
  union all select task_uuid, 'step.state_transition', count(*) from moves where not of_task group by 1
  union all select task_uuid, 'task.orchestration', count(*) from moves
    where of_task and to_state in ('complete', 'error', 'cancelled', 'resolved_manually') group by 1
  union all select task_uuid, 'step.discovery', count(*) from moves
    where of_task and from_state in ('initializing', 'evaluating_results') and to_state = 'enqueuing_steps' group by 1
  union all select task_uuid, 'step.enqueuing', count(*) from moves
    where of_task and from_state = 'enqueuing_steps' and to_state = 'steps_in_process' group by 1
  union all select task_uuid, 'result.evaluation', count(*) from moves
    where of_task and from_state = 'steps_in_process' and to_state = 'evaluating_results' group by 1
  union all select task_uuid, 'handler.execution', count(*) from moves where not of_task and event = 'Claim' group by 1
  union all select task_uuid, 'result.submission', count(*) from moves where not of_task and event = 'Report' group by 1
  -- A step that starts a task and awaits it is an attempt without a message.
  union all select task_uuid, 'step.execution', count(*) from moves where not of_task
    and (to_state = 'enqueued' or (to_state = 'waiting' and detail->>'waiting' = 'child')) group by 1
  -- In the queue, and what each row says was waited for before.
  union all select task_uuid, 'step.wait', count(*) filter (where to_state = 'enqueued')
      + coalesce(sum(jsonb_array_length(detail->'waits')), 0) from moves where not of_task group by 1
)
select task_uuid::text, name, sum(n)::bigint from names group by 1, 2 having sum(n) > 0";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `just trace-proof`"]
async fn a_clean_run_sends_exactly_the_spans_that_the_rows_of_the_log_ask_for() {
    let world = World::start(setup(2, 2)).await;
    let features = features();
    register_mix(&world, &features).await;
    let count = usize::try_from(number("TASKER_PROOF_CLEAN_TASKS", 1000)).unwrap();
    let tasks = submit_mix(&world, &features, count).await;
    world.finish_within(&tasks, DEADLINE * 10).await;
    wind_up(&world).await;
    eventually_long(async || world.number("select count(*) from tasker.tasks where finished_at is null").await == 0)
        .await;
    world.queues_drained().await;
    eventually_long(async || world.number("select count(*) from tasker.export_batches").await == 0).await;
    let rows: Vec<(String, String, i64)> = sqlx::query_as(EXPECTED).fetch_all(&world.pool).await.unwrap();
    let expected: BTreeMap<(String, String), i64> = rows.into_iter().map(|(task, name, n)| ((task, name), n)).collect();
    let mut arrived: BTreeMap<(String, String), i64> = BTreeMap::new();
    for span in world.receiver.spans() {
        let task = span.text(names::TASK_UUID).expect("each span names its task").to_owned();
        *arrived.entry((task, span.span.name)).or_default() += 1;
    }
    let differing: Vec<_> = expected
        .keys()
        .chain(arrived.keys())
        .filter(|key| expected.get(*key) != arrived.get(*key))
        .map(|key| format!("{key:?}: the rows ask for {:?}, {:?} arrived", expected.get(key), arrived.get(key)))
        .take(10)
        .collect();
    println!(
        "PROOF clean run: {} tasks with all features and those that they started, {} spans, as counted in SQL",
        tasks.len(),
        arrived.values().sum::<i64>()
    );
    assert_eq!(differing, [""; 0]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `just trace-proof`"]
async fn a_task_of_ten_thousand_steps_is_read_in_parts() {
    let world = World::start(Setup { rust_workers: 2, workers: 0, ..Setup::default() }).await;
    world
        .register(
            "wide",
            "\nsteps:\n  - {name: each, handler: ok, for_each: '${input.items}', input: {n: '${item}'}}\n",
        )
        .await;
    let steps = usize::try_from(number("TASKER_PROOF_STEPS", 10_000)).unwrap();
    let items: Vec<usize> = (0..steps).collect();
    let task = world.submit_with(json!({"template": "wide", "input": {"items": items}})).await.unwrap();
    assert_eq!(world.finish_within(&[task], DEADLINE * 30).await, ["complete"]);

    let began = Instant::now();
    let client = tasker_shared::client::Client::from_pool(world.pool.clone());
    let (log, now) = client.log(task).await.unwrap();
    let of_log = began.elapsed();
    let policy = redact::policy();
    let spans = read::flat(tree::spans_so_far(&log, now), &ServiceNames::default(), &policy);
    let all = spans.len();
    let view = read::view(spans, true, &Include::default(), Sources::default(), &policy);
    let body = serde_json::to_vec(&view).unwrap();
    let took = began.elapsed();
    assert_eq!((view.shown, view.spans), (1000, all));

    // As the HTTP API and `tasker trace export` write it: the log stays, a line of spans comes and goes.
    let (held, began) = (resident_kb(), Instant::now());
    let (mut total, mut bytes, mut most, mut peak) = (0, 0, 0, held);
    for part in tree::in_parts(&log, 512) {
        total += part.spans.len();
        let line = otlp::json_line(&part, &ServiceNames::default());
        (bytes, most, peak) = (bytes + line.len(), most.max(line.len()), peak.max(resident_kb()));
    }
    let streamed = began.elapsed();
    assert_eq!(total, tree::spans(&log).spans.len());
    let began = Instant::now();
    let mut encoder = Encoder::new(&ServiceNames::default());
    for part in tree::in_parts(&log, 2048) {
        let mut next = 0;
        while next < part.spans.len() {
            next = encoder.push_from(&part, next, 2 << 20);
            if encoder.bytes_len() >= 2 << 20 {
                encoder.finish();
            }
        }
    }
    let protobuf = began.elapsed();
    let began = Instant::now();
    let on = (0..1_000_000).filter(|_| live::is_on(live::Area::Db, Some(std::hint::black_box("tests")))).count();
    let off = began.elapsed();
    assert_eq!(on, 0);
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let (rate, each) = (total as f64 / streamed.as_secs_f64(), protobuf.as_secs_f64() * 1e6 / total as f64);
    println!(
        "PROOF {steps} steps: log {:.2} s, summary and first 1,000 of {all} spans {:.2} s ({} KB); OTLP JSON {rate:.0} spans/s, {} MB, \
         {} KB at most at once, {} MB resident before and {} MB more at most meanwhile{}",
        of_log.as_secs_f64(),
        took.as_secs_f64(),
        body.len() / 1000,
        bytes / 1_000_000,
        most / 1000,
        held / 1024,
        (peak - held) / 1024,
        if cfg!(debug_assertions) { " (unoptimised build)" } else { "" }
    );
    println!(
        "PROOF a span of the tree: {each:.2} µs to derive and encode; an area that is off: {:.1} ns",
        off.as_secs_f64() * 1e3
    );
    assert!((peak - held) < 48 * 1024, "memory is flat");
    if !cfg!(debug_assertions) && steps >= 10_000 {
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert!(rate >= 50_000.0, "{rate:.0} spans/s");
    }
    world.end().await;
}

/// What this process holds in memory.
fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
}

/// Against Jaeger's own query API, where there is one.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Jaeger: `just trace-proof`"]
async fn jaeger_shows_what_the_log_says() {
    let (Ok(query), Ok(otlp)) = (std::env::var("JAEGER_QUERY_URL"), std::env::var("JAEGER_OTLP_URL")) else {
        println!("PROOF Jaeger: SKIPPED, JAEGER_QUERY_URL and JAEGER_OTLP_URL are not set");
        return;
    };
    let world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    world.register_steps("chain", "a: ok\nb: flaky <- a\nc: ok <- b").await;
    let protocol = if otlp.ends_with(":4317") { "grpc" } else { "http/protobuf" };
    let options = tasker_orchestration::Options {
        trace: tasker_tests::trace_config(&otlp, protocol),
        ..tasker_orchestration::Options::default()
    };
    let orchestrator = tasker_orchestration::Orchestrator::start(&world.url, &options).await.unwrap();
    let task = world.submit("chain").await;
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    assert!(orchestrator.flush(DEADLINE).await);
    let config = tasker_shared::trace::config::TraceConfig {
        query_url: Some(query.trim_end_matches('/').to_owned()),
        ..tasker_shared::trace::config::TraceConfig::default()
    };
    let backend = tasker_api::trace::backend::Backend::of(&config).expect("a URL");
    let client = tasker_shared::client::Client::from_pool(world.pool.clone());
    let (log, _) = client.log(task).await.unwrap();
    let own = read::flat(tree::spans(&log), &ServiceNames::default(), &redact::policy());
    let theirs = eventually("Jaeger has every span", async || {
        let spans = backend.trace(log.head.trace_id, &redact::policy()).await.ok()?;
        (spans.len() == own.len()).then_some(spans)
    })
    .await;
    let pairs = |spans: &[read::Flat]| -> BTreeMap<String, (String, Option<String>)> {
        spans.iter().map(|span| (span.span_id.clone(), (span.name.to_string(), span.parent_span_id.clone()))).collect()
    };
    assert_eq!(pairs(&theirs), pairs(&own), "the hierarchy is the log's");
    println!("PROOF Jaeger: {} spans, hierarchy equal to the log", own.len());
    orchestrator.shutdown(DEADLINE).await;
    world.end().await;
}
