//! Everything at once, while orchestrators and workers are killed: each feature keeps its promise,
//! nothing is lost, stuck or orphaned.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{DEADLINE, World, storm};
use crate::mix::{SEEN, features, register_mix, setup, submit_mix, wind_up};

/// Kills a process of each kind in turn, as soon as so many moves were made since the last kill, and
/// so often at most: schedules make moves for as long as it takes, and a slow machine would spend
/// all of its time on beginning processes.
pub async fn kill_until(world: &World, moves: i64, most: usize, done: &AtomicBool) -> usize {
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
        if killed == most {
            continue;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_mix_of_every_feature_survives_the_killing_of_both_kinds_of_process() {
    let mut world = World::start(setup(0, 1)).await;
    let features = features();
    register_mix(&world, &features).await;
    let done = AtomicBool::new(false);
    let work = async {
        let tasks = submit_mix(&world, &features, storm(features.len() * 4, features.len() * 50)).await;
        let states = world.finish_within(&tasks, DEADLINE * 10).await;
        wind_up(&world).await;
        done.store(true, Ordering::Relaxed);
        (tasks, states)
    };
    // Whatever moment it sees: what moves is not stuck, and what is killed leaves its leases.
    let look = async {
        while !done.load(Ordering::Relaxed) {
            let stuck =
                world.words("select format('%s %s: %s', task_uuid, state, why) from tasker.stuck_tasks()").await;
            assert_eq!(stuck, [""; 0]);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let (killed, (tasks, states), ()) = tokio::join!(kill_until(&world, 150, storm(30, 300), &done), work, look);
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
    for (what, query) in SEEN {
        assert!(world.number(query).await > 0, "none among them: {what}");
    }
    world.queues_drained().await;
    world.assert_complete().await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.end().await;
}
