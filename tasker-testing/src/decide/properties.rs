//! Random graphs, random handlers, random schedules: what must hold whatever happens.
//!
//! The rules themselves are checked by the simulated world after every settle; here stands
//! what happens to it, and what must be true at the end.

mod driver;
mod story;

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use crate::simulation::{LEASE, World, id, operator, success, template};
use tasker_shared::state_machine::decide::Event;
use tasker_shared::state_machine::plan::{Room, Step};
use tasker_shared::state_machine::states::{StepState, TaskState};

pub(crate) use self::driver::Driver;
pub(crate) use self::story::{Story, story};

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn every_task_ends_or_waits_for_a_person(story in story()) {
        let mut driver = Driver::new(&story);
        driver.run()?;
        let world = &driver.world;
        if story.invalid {
            prop_assert!(matches!(world.task.state, TaskState::Error | TaskState::Cancelled));
        }
        for step in &world.steps {
            // Whoever reported was heard, or somebody else had taken over.
            prop_assert!(!step.state.is_in_flight(), "{:?}", step);
            prop_assert!(step.attempt <= 60);
        }
    }

    #[test]
    fn what_an_operator_retries_completes_once_its_cause_is_gone(story in story()) {
        let story = story.curable();
        let mut driver = Driver::new(&story);
        driver.run()?;
        if matches!(driver.world.task.state, TaskState::Complete | TaskState::ResolvedManually) {
            return Ok(());
        }
        driver.heal()?;
        let world = &driver.world;
        prop_assert_eq!(world.task.state, TaskState::Complete, "{:?}", world.task);
        // What a failed item means was for its map to say.
        let done =
            |step: &Step| step.item.is_some() || matches!(step.state, StepState::Complete | StepState::ResolvedManually | StepState::Skipped);
        prop_assert!(world.steps.iter().all(done), "{:?}", world.steps);
    }

    #[test]
    fn a_rerun_touches_what_follows_and_what_was_not_done_and_nothing_else(story in story(), from in any::<u32>()) {
        let mut driver = Driver::new(&story.curable());
        driver.run()?;
        if !driver.world.task.state.is_terminal() || driver.world.steps.is_empty() {
            return Ok(());
        }
        let from = from % u32::try_from(driver.world.definition.steps.len()).unwrap();
        let before = driver.world.clone();
        let name = before.definition.steps[from as usize].name.to_string();
        driver.healed = true;
        driver.settle(vec![Event::Rerun { operator: operator("ruth"), from: vec![name] }], Room::unlimited())?;
        driver.drain()?;
        let world = &driver.world;
        prop_assert_eq!(world.task.generation, before.task.generation + 1);
        let mut follows = BTreeSet::from([from]);
        for (old, new) in before.steps.iter().zip(&world.steps) {
            if world.definition.graph.parents(old.index).iter().any(|parent| follows.contains(parent)) {
                follows.insert(old.index);
            }
            let done = matches!(old.state, StepState::Complete | StepState::ResolvedManually);
            if old.item.is_some() && follows.contains(&old.index) {
                // The list may be shorter now, or its map not be chosen.
                prop_assert!(new.state.is_terminal());
            } else if follows.contains(&old.index) {
                // What a decision that was not run again did not choose stays as it was.
                let ran = new.attempt > old.attempt || world.is_map(new);
                let again = ran && new.generation == world.task.generation;
                prop_assert!(new.state == StepState::Skipped || (new.state == StepState::Complete && again));
            } else if done && (old.item.is_none() || world.steps[old.index as usize].version == before.steps[old.index as usize].version) {
                prop_assert_eq!((new.attempt, new.version), (old.attempt, old.version), "it keeps what it came to");
            }
        }
        prop_assert_eq!(world.task.state, TaskState::Complete);
    }
}

/// The rarest of the random stories, told on purpose: a step that is lost again and again.
#[test]
fn a_step_that_is_lost_too_often_fails() {
    let mut world = World::started(template("a"));
    for _ in 0..=tasker_shared::state_machine::decide::MAX_LOST {
        world.claim_step("a");
        world.pass(LEASE + Duration::from_secs(1));
        world.due.clear();
        world.settle(vec![Event::LeaseDue { step: id(0) }], &mut Room::unlimited());
    }
    assert_eq!((world.task.state, world.step("a").state), (TaskState::Error, StepState::Error));
    assert_eq!(world.step("a").failures, 0, "a loss spends no retry");
    let finished = World::started(template("a")).finish_step("a", success());
    assert_eq!(finished.task.state, TaskState::Complete);
}
