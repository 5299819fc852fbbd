//! Branches, conditions and joins, told one by one; the random suite mixes them.

use serde_json::{Value, json};

use crate::simulation::{
    World, failure, id, permanent, success, template, with, with_branches, with_input, with_join, with_when,
};
use tasker_shared::state_machine::definition::{Definition, Join};
use tasker_shared::state_machine::plan::Outcome;
use tasker_shared::state_machine::states::TaskState;

fn output(value: Value) -> Outcome {
    Outcome::Success(value)
}

fn chooses(branches: &[&str]) -> Outcome {
    output(json!({ "branches": branches }))
}

fn states(world: &World) -> String {
    let words =
        world.steps.iter().map(|step| format!("{}:{}", world.definition.steps[step.index as usize].name, step.state));
    words.collect::<Vec<_>>().join(" ")
}

fn reason(world: &World, name: &str) -> String {
    let step = world.step(name).uuid;
    let row = world.log.iter().rfind(|row| row.made.entity == step).expect("it moved");
    row.made.detail.as_ref().and_then(|detail| detail.reason.clone()).unwrap_or_default()
}

/// route decides between x and y, and also runs z; the join is behind all three.
fn fork(join: Join) -> Definition {
    with_join(with_branches(template("route x<route y<route z<route end<x,y,z"), "route", &["x", "y"]), "end", join)
}

#[test]
fn only_the_chosen_branch_runs() {
    let mut world = World::started(fork(Join::Taken));
    world.finish_step("route", output(json!({"branch": "x"})));
    assert_eq!(states(&world), "route:complete x:enqueued y:skipped z:enqueued end:pending");
    assert_eq!(reason(&world, "y"), "decision route did not choose it");
    world.finish_step("x", success());
    world.finish_step("z", success());
    world.finish_step("end", success());
    assert_eq!(world.task.state, TaskState::Complete);
}

#[test]
fn join_all_is_skipped_with_its_first_skipped_dependency() {
    let mut world = World::started(fork(Join::All));
    world.finish_step("route", chooses(&["x"]));
    assert_eq!(states(&world), "route:complete x:enqueued y:skipped z:enqueued end:skipped");
    assert_eq!(reason(&world, "end"), "step y was skipped");
}

#[test]
fn join_any_runs_at_the_first_that_is_done_and_only_once() {
    let mut world = World::started(fork(Join::Any));
    world.finish_step("route", chooses(&["x", "y"]));
    world.finish_step("z", success());
    assert_eq!(states(&world), "route:complete x:enqueued y:enqueued z:complete end:enqueued");
    world.finish_step("end", success());
    world.finish_step("x", success());
    assert_eq!(world.task.state, TaskState::StepsInProcess, "y is still open");
    world.finish_step("y", success());
    assert_eq!(world.task.state, TaskState::Complete);
    assert_eq!(world.step("end").attempt, 1);
}

#[test]
fn joins_are_skipped_when_nothing_was_taken() {
    for join in [Join::Taken, Join::Any] {
        let definition = with_branches(template("route x<route y<route end<x,y after<end"), "route", &["x", "y"]);
        let mut world = World::started(with_join(definition, "end", join));
        world.finish_step("route", chooses(&[]));
        assert_eq!(states(&world), "route:complete x:skipped y:skipped end:skipped after:skipped");
        assert_eq!(reason(&world, "end"), "every step it depends on was skipped");
        assert_eq!(world.task.state, TaskState::Complete);
    }
}

#[test]
fn what_was_exhausted_and_continued_counts_as_taken() {
    let definition = with(fork(Join::Taken), "x", |step| {
        step.retry.on_exhausted = tasker_shared::state_machine::retry::OnExhausted::Continue;
    });
    let mut world = World::started(with_when(definition, "z", "${input.total} == 0"));
    world.finish_step("route", chooses(&["x"]));
    assert_eq!(states(&world), "route:complete x:enqueued y:skipped z:skipped end:pending");
    world.finish_step("x", permanent("Broken"));
    assert_eq!(states(&world), "route:complete x:error y:skipped z:skipped end:enqueued");
}

#[test]
fn an_unknown_branch_fails_the_decision_and_says_which_there_are() {
    for (answer, says) in [
        (json!({"branch": "w"}), "decision route chose \"w\", which is not one of its branches: x, y"),
        (json!({"branches": ["x", "z"]}), "decision route chose \"z\", which is not one of its branches: x, y"),
        (json!({"branch": ["x"]}), "the output of decision route must be {\"branch\": name}"),
        (json!("x"), "the output of decision route must be"),
        (json!({"branch": "x", "branches": ["x"]}), "the output of decision route must be"),
    ] {
        let mut world = World::started(fork(Join::Taken));
        world.finish_step("route", output(answer));
        assert_eq!(world.task.state, TaskState::Error);
        assert_eq!(world.task.error_type.as_deref(), Some("unknown_branch"));
        assert!(reason(&world, "route").starts_with(says), "{}", reason(&world, "route"));
    }
}

#[test]
fn a_decision_that_an_operator_retries_decides_again() {
    let mut world = World::started(fork(Join::Taken));
    world.finish_step("route", output(json!({"branch": "w"})));
    let retry = World::retry_event();
    world.settle(vec![retry], &mut tasker_shared::state_machine::plan::Room::unlimited());
    world.finish_step("route", chooses(&["y"]));
    assert_eq!(states(&world), "route:complete x:skipped y:enqueued z:enqueued end:pending");
}

#[test]
fn a_condition_is_decided_when_its_dependencies_are_done() {
    for (n, end) in [(3, "a:complete b:enqueued c:pending"), (2, "a:complete b:skipped c:skipped")] {
        let mut world = World::started(with_when(template("a b<a c<b"), "b", "${steps.a.output.n} >= 3"));
        world.finish_step("a", output(json!({ "n": n })));
        assert_eq!(states(&world), end);
    }
    let mut world = World::started(with_when(template("a b<a"), "b", "${steps.a.output.n} >= 3"));
    world.finish_step("a", output(json!({"n": "three"})));
    assert_eq!(world.task.error_type.as_deref(), Some("invalid_condition"));
    assert_eq!(reason(&world, "b"), "when compares ${steps.a.output.n} with a number, but it is a string");
}

#[test]
fn a_condition_that_waited_for_a_retry_sees_the_last_output() {
    let definition = with_when(template("a b<a"), "b", "${steps.a.output.ok} == true");
    let mut world = World::started(definition);
    world.finish_step("a", failure("Flaky"));
    let due = world.step("a").due_at.expect("a retry");
    world.clock = due;
    world.due.clear();
    world.settle(
        vec![tasker_shared::state_machine::Event::RetryDue { step: id(0) }],
        &mut tasker_shared::state_machine::plan::Room::unlimited(),
    );
    world.finish_step("a", output(json!({"ok": true})));
    assert_eq!(states(&world), "a:complete b:enqueued");
}

#[test]
fn a_task_whose_every_step_is_skipped_is_complete_at_once() {
    let world = World::started(with_when(template("a b<a"), "a", "${input.total} > 7"));
    assert_eq!((states(&world).as_str(), world.task.state), ("a:skipped b:skipped", TaskState::Complete));
    assert_eq!(reason(&world, "a"), "its condition does not hold: ${input.total} > 7");
}

#[test]
fn a_skipped_steps_output_reads_as_null() {
    let input = json!({"x": "${steps.x.output.n}", "y": "${steps.y.output.deep.inside}"});
    let mut world = World::started(with_input(fork(Join::Taken), "end", &input));
    world.finish_step("route", chooses(&["x"]));
    world.finish_step("x", output(json!({"n": 5})));
    world.finish_step("z", success());
    assert_eq!(world.step("end").input, Some(json!({"x": 5, "y": null})));
}

#[test]
fn a_long_chain_is_skipped_in_one_settle() {
    let words: Vec<String> = (1..5_000).map(|n| format!("s{n}<s{}", n - 1)).collect();
    let definition = template(&format!("s0 {}", words.join(" ")));
    let world = World::started(with_when(definition, "s0", "${input.total} == 0"));
    assert_eq!(world.task.state, TaskState::Complete);
}
