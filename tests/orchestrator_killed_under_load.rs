//! Orchestrators that are killed again and again under load lose nothing and leave no orphan.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{DEADLINE, Setup, World, storm};
use crate::two_orchestrators_two_workers::{assert_outcomes, register_mix, submit_mix};

#[tokio::test(flavor = "multi_thread")]
async fn killed_orchestrators_lose_nothing_and_leave_no_orphan() {
    let mut world = World::start(Setup { orchestrators: 0, rust_workers: 1, ..Setup::default() }).await;
    register_mix(&world).await;
    let done = AtomicBool::new(false);
    let kill = async {
        let mut killed = 0;
        let mut processes = Vec::new();
        for _ in 0..3 {
            processes.push(world.orchestrator_process().await);
        }
        while !done.load(Ordering::Relaxed) {
            // Between two kills some work gets done, however fast or slow the machine is.
            let before = world.number("select count(*) from tasker.transitions").await;
            let until = tokio::time::Instant::now() + DEADLINE;
            while world.number("select count(*) from tasker.transitions").await < before + 100
                && !done.load(Ordering::Relaxed)
            {
                assert!(tokio::time::Instant::now() < until, "nothing moves after {killed} kills");
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            processes.remove(0).kill().await;
            killed += 1;
            processes.push(world.orchestrator_process().await);
        }
        for process in processes {
            process.kill().await;
        }
        killed
    };
    let work = async {
        let tasks = submit_mix(&world, storm(300, 3000)).await;
        let states = world.finish_within(&tasks, DEADLINE * 10).await;
        done.store(true, Ordering::Relaxed);
        states
    };
    let (killed, states) = tokio::join!(kill, work);
    assert!(killed >= 3, "only {killed} were killed under load");
    assert_outcomes(&states);
    // Whoever comes next delivers what the dead ones owed.
    world.add_orchestrator().await;
    world.queues_drained().await;
    world.assert_complete().await;
    assert_eq!(world.number("select count(*) from tasker.quarantine").await, 0);
    world.end().await;
}
