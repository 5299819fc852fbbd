//! Two of each share one database without stepping on each other; one worker speaks SQL, one is
//! ours.

use uuid::Uuid;

use crate::harness::{DEADLINE, Setup, World, storm};

/// Templates of the mixed load: chains, fan-outs, retries, failures.
pub async fn register_mix(world: &World) {
    world.register_steps("chain", "a: ok\nb: ok <- a\nc: ok <- b\nd: ok <- c").await;
    world.register_steps("fan", "a: ok\nb: ok <- a\nc: ok <- a\nd: flaky <- a\ne: ok <- a\nf: ok <- b c d e").await;
    world.register_steps("fails", "a: ok\nb: broken <- a\nc: ok <- a\nd: ok <- b c").await;
    world.register_steps("one", "a: ok").await;
    world.register_steps("retries", "a: flaky\nb: flaky <- a").await;
}

/// The template of the n-th task and how it ends.
pub fn nth(n: usize) -> (&'static str, &'static str) {
    [("chain", "complete"), ("fan", "complete"), ("fails", "error"), ("one", "complete"), ("retries", "complete")]
        [n % 5]
}

/// Submits that many tasks of the mix.
pub async fn submit_mix(world: &World, tasks: usize) -> Vec<Uuid> {
    let mut submitted = Vec::new();
    for n in 0..tasks {
        submitted.push(world.submit(nth(n).0).await);
    }
    submitted
}

/// Fails unless each task of the mix ended as its template does.
pub fn assert_outcomes(states: &[String]) {
    for (n, state) in states.iter().enumerate() {
        let (template, expected) = nth(n);
        assert_eq!(state, expected, "task {n} of template {template}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_load_is_complete_and_every_span_arrives() {
    let world = World::start(Setup { orchestrators: 2, workers: 1, rust_workers: 1, ..Setup::default() }).await;
    register_mix(&world).await;
    let tasks = submit_mix(&world, storm(300, 5000)).await;
    assert_outcomes(&world.finish_within(&tasks, DEADLINE * 10).await);
    world.queues_drained().await;
    world.assert_complete().await;
    let served = world.words("select count(distinct actor)::text from tasker.transitions where event = 'Claim'").await;
    assert_eq!(served, ["2"], "both workers had work");
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    for orchestrator in &world.orchestrators {
        let exported = orchestrator.export_stats().expect("traced").exported.load(std::sync::atomic::Ordering::Relaxed);
        assert!(exported > 0, "both orchestrators had work");
    }
    world.end().await;
}
