//! What each event does, told as a table: the rows before come from the simulated world, the
//! plan is told in words.

mod failures;
mod flow;
mod operators;
mod waits;

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use crate::simulation::{
    LEASE, QUEUE, World, failure, id, is_held, operator, permanent, room_for, signal_wait, success, template, with,
    with_input, with_wait,
};
use tasker_shared::state_machine::decide::Event;
use tasker_shared::state_machine::flow::{Allows, Free, LimitSlots, Rule};
use tasker_shared::state_machine::input::InputTemplate;
use tasker_shared::state_machine::plan::{HeldBy, Outcome, Plan, Room};
use tasker_shared::state_machine::retry::OnExhausted;
use tasker_shared::state_machine::states::{StepState, TaskState};
use tasker_shared::state_machine::wait::{OnTimeout, WaitFor};

/// Settles the events and compares what the plan says, line by line; the simulated world
/// checks every general rule on the way.
#[track_caller]
fn check(world: &mut World, events: Vec<Event>, mut room: Room, expected: &str) -> Plan {
    let taken: Vec<u32> = events.iter().filter_map(|event| world.event_key(event)).collect();
    world.results.retain(|(step, _)| !taken.contains(step));
    world.due.retain(|(_, at, step)| *at > world.clock || step.is_some_and(|step| !taken.contains(&step)));
    let plan = world.settle(events, &mut room);
    let expected: Vec<&str> = expected.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let told = tell(world, &plan);
    assert_eq!(told.lines().collect::<Vec<_>>(), expected, "\n{told}");
    plan
}

fn tell(world: &World, plan: &Plan) -> String {
    let name = |uuid| {
        let step = world.steps.iter().find(|step| step.uuid == uuid);
        step.map_or("task", |step| &world.definition.steps[step.index as usize].name)
    };
    let mut told = String::new();
    for made in &plan.moves {
        let by = made.actor.as_ref().map(|actor| format!(" by {actor}")).unwrap_or_default();
        writeln!(
            told,
            "{}: {} –{}→ {}{by}",
            name(made.entity),
            made.change.from(),
            made.change.event(),
            made.change.to()
        )
        .unwrap();
    }
    for (step, attempt) in &plan.closed {
        writeln!(told, "close {} {attempt}", name(*step)).unwrap();
    }
    for (step, _) in &plan.steps {
        if let Some(held) = step.held_by {
            writeln!(told, "hold {}: {}", name(step.uuid), held.as_str()).unwrap();
        }
    }
    for step in plan.new_steps.iter().filter(|step| step.held_by.is_some()) {
        writeln!(told, "hold {}: {}", name(step.uuid), step.held_by.unwrap().as_str()).unwrap();
    }
    for send in &plan.sends {
        writeln!(told, "send {} {}", name(send.step), send.attempt).unwrap();
    }
    for due in &plan.due {
        let of = due.step.map(|step| format!(" {}", name(step))).unwrap_or_default();
        // The clock ticks while a plan is applied; a person reads whole seconds.
        let seconds = (due.at - world.settled.last().map_or(world.clock, |settled| settled.at)).num_milliseconds();
        writeln!(told, "due {}{of} in {} s", due.kind, (seconds + 500) / 1000).unwrap();
    }
    if plan.cancel_open_steps {
        writeln!(told, "cancel open steps").unwrap();
    }
    for act in &plan.audit {
        let steps = act.details.as_ref().map(|details| format!(" of {}", details["steps"])).unwrap_or_default();
        writeln!(told, "audit {} by {}{steps}", act.action, act.actor).unwrap();
    }
    for given in &plan.outputs {
        writeln!(told, "output of {} {}: {}", name(given.step), given.attempt, given.output).unwrap();
    }
    for worker in &plan.tell {
        writeln!(told, "tell {worker}").unwrap();
    }
    if let Some(reason) = plan.task.reason.as_ref().filter(|_| !plan.moves.is_empty()) {
        let kind = plan.task.error_type.as_deref().unwrap_or("no error");
        writeln!(told, "because {kind}: {reason}").unwrap();
    }
    if plan.ignored > 0 {
        writeln!(told, "ignored {}", plan.ignored).unwrap();
    }
    told
}

/// The reasons of the waits that a move of this event ended.
fn waits(plan: &Plan, event: &str) -> Vec<String> {
    let made = plan.moves.iter().find(|made| made.change.event() == event).expect("the move was made");
    made.detail.iter().flat_map(|detail| &detail.waits).map(|wait| wait.reason.clone()).collect()
}

fn output(world: &World, step: &str) -> Value {
    world.step(step).input.clone().unwrap()
}

fn all() -> Room {
    Room::unlimited()
}

#[test]
fn start_sends_the_roots() {
    let mut world = World::new(template("a b c<a,b"));
    check(
        &mut world,
        vec![Event::Start],
        all(),
        "
        task: pending –Start→ initializing
        a: pending –Enqueue→ enqueued
        b: pending –Enqueue→ enqueued
        task: initializing –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 1
        send b 1",
    );
    assert_eq!(output(&world, "a"), json!({"input": {"total": 7}, "steps": {}}));
    assert_eq!(world.step("a").enqueued_task_version, Some(3), "it names the move that sends it");
}

#[test]
fn start_with_less_room_holds_the_rest() {
    let mut world = World::new(template("a b c"));
    check(
        &mut world,
        vec![Event::Start],
        room_for(1, &["do.a", "do.b"], false),
        "
        task: pending –Start→ initializing
        a: pending –Enqueue→ enqueued
        task: initializing –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        hold b: room
        hold c: worker
        send a 1",
    );
    assert_eq!(world.task.held_steps, 2);
}

#[test]
fn start_without_any_worker_waits() {
    let mut world = World::new(template("a b<a"));
    check(
        &mut world,
        vec![Event::Start],
        Room::default(),
        "
        task: pending –Start→ initializing
        task: initializing –NoDependenciesReady→ waiting_for_dependencies
        hold a: worker",
    );
    check(
        &mut world,
        vec![Event::Admit { step: id(0) }],
        room_for(1, &["do.a"], true),
        "
        a: pending –Enqueue→ enqueued
        task: waiting_for_dependencies –StepsAdmitted→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 1",
    );
    let wait =
        &world.log.iter().find(|row| row.made.change.event() == "Enqueue").unwrap().made.detail.as_ref().unwrap().waits
            [0];
    assert_eq!((&*wait.reason, wait.ordinal), ("worker", 1));
}

#[test]
fn start_twice_is_a_start() {
    let mut world = World::started(template("a"));
    check(&mut world, vec![Event::Start], all(), "ignored 1");
}

#[test]
fn start_of_a_template_without_steps_completes() {
    let mut world = World::new(template(""));
    check(
        &mut world,
        vec![Event::Start],
        all(),
        "
        task: pending –Start→ initializing
        task: initializing –NoStepsFound→ complete",
    );
}

#[test]
fn start_of_a_limited_task_is_watched() {
    let mut definition = template("a");
    definition.total = Some(Duration::from_hours(1));
    let mut world = World::new(with(definition, "a", |a| {
        a.queue_timeout = Some(Duration::from_mins(1));
    }));
    check(
        &mut world,
        vec![Event::Start],
        all(),
        "
        task: pending –Start→ initializing
        a: pending –Enqueue→ enqueued
        task: initializing –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 1
        due total_timeout in 3600 s
        due queue_timeout a in 60 s",
    );
}

#[test]
fn invalid_input_ends_the_task_before_it_has_steps() {
    let mut world = World::new(template("a"));
    world.invalid_input = Some("total: must be a number".into());
    check(
        &mut world,
        vec![Event::Start],
        all(),
        "
        task: pending –Start→ initializing
        task: initializing –InvalidInput→ error
        cancel open steps
        because invalid_input: total: must be a number",
    );
    assert!(world.steps.is_empty());
}

#[test]
fn success_hands_the_output_on() {
    let mut world = World::started(template("a b<a"));
    let event = world.run_step("a", Outcome::Success(json!({"n": 5})));
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        b: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close a 1
        send b 1",
    );
    assert_eq!(output(&world, "b"), json!({"input": {"total": 7}, "steps": {"a": {"n": 5}}}));
}

#[test]
fn the_last_success_completes_the_task() {
    let mut world = World::started(template("a"));
    let event = world.run_step("a", success());
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –AllStepsCompleted→ evaluating_results
        task: evaluating_results –AllStepsSuccessful→ complete
        close a 1",
    );
}

#[test]
fn success_beside_others_goes_on() {
    let mut world = World::started(template("a b c<a,b"));
    let event = world.run_step("a", success());
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        task: evaluating_results –StepsStillRunning→ steps_in_process
        close a 1",
    );
}

#[test]
fn duplicate_result_changes_nothing() {
    let mut world = World::started(template("a b"));
    let event = world.run_step("a", success());
    check(
        &mut world,
        vec![event.clone(), event.clone()],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        task: evaluating_results –StepsStillRunning→ steps_in_process
        close a 1
        ignored 1",
    );
    check(&mut world, vec![event], all(), "ignored 1");
}

#[test]
fn duplicate_result_still_brings_its_output() {
    let mut world = World::started(template("a b c<a,b"));
    let first = world.run_step("a", Outcome::Success(json!({"n": 5})));
    world.settle(vec![first.clone()], &mut all());
    world.results.clear();
    let second = world.run_step("b", Outcome::Success(json!({"n": 6})));
    check(
        &mut world,
        vec![first, second],
        all(),
        "
        b: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        c: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close b 1
        send c 1
        ignored 1",
    );
    assert_eq!(output(&world, "c"), json!({"input": {"total": 7}, "steps": {"a": {"n": 5}, "b": {"n": 6}}}));
}

#[test]
fn result_of_another_attempt_changes_nothing() {
    let mut world = World::started(template("a"));
    let claim = world.claim_step("a");
    world.pass(LEASE);
    world.settle(vec![Event::LeaseDue { step: id(0) }], &mut all());
    assert!(!world.report(claim, success()));
    world.run_step("a", success());
    check(
        &mut world.clone(),
        vec![Event::Result { step: id(0), attempt: 1 }, Event::Result { step: id(0), attempt: 3 }],
        all(),
        "ignored 2",
    );
    check(
        &mut world,
        vec![Event::Result { step: id(0), attempt: 2 }],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –AllStepsCompleted→ evaluating_results
        task: evaluating_results –AllStepsSuccessful→ complete
        close a 2",
    );
}

#[test]
fn late_result_changes_nothing() {
    let mut world = World::started(template("a b"));
    let event = world.run_step("a", success());
    world.settle(vec![Event::Cancel(operator("carl"))], &mut all());
    check(&mut world, vec![event], all(), "ignored 1");
}

#[test]
fn a_step_that_finds_no_room_is_held_and_admitted_later() {
    let mut world = World::started(template("a b<a c<a"));
    let event = world.run_step("a", success());
    check(
        &mut world,
        vec![event],
        room_for(1, &["do.b", "do.c"], false),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        b: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close a 1
        hold c: room
        send b 1",
    );
    check(
        &mut world,
        vec![Event::Admit { step: id(2) }],
        room_for(0, &["do.c"], true),
        "
        hold c: room",
    );
    check(
        &mut world,
        vec![Event::Admit { step: id(2) }],
        room_for(1, &["do.c"], true),
        "
        c: pending –Enqueue→ enqueued
        task: steps_in_process –StepsAdmitted→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send c 1",
    );
    assert!(!is_held(&world, HeldBy::Room));
}

#[test]
fn new_ready_steps_queue_behind_those_that_wait() {
    let mut world = World::started(template("a b<a"));
    let event = world.run_step("a", success());
    check(
        &mut world,
        vec![event],
        room_for(5, &["do.b"], true),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        task: evaluating_results –NoDependenciesReady→ waiting_for_dependencies
        close a 1
        hold b: room",
    );
    assert!(is_held(&world, HeldBy::Room));
}

#[test]
fn a_result_that_cannot_be_read_fails_its_attempt() {
    let mut world = World::started(template("a"));
    world.run_step("a", success());
    let quarantined = |attempt| Event::Quarantined { step: id(0), attempt, reason: "not JSON".into() };
    check(&mut world, vec![quarantined(2)], all(), "ignored 1");
    world.results.push((0, 1));
    check(
        &mut world,
        vec![quarantined(1)],
        all(),
        "
        a: enqueued_for_orchestration –Fail→ error
        task: steps_in_process –AllStepsCompleted→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        close a 1
        cancel open steps
        because quarantined: step a failed: not JSON",
    );
}

#[test]
fn fan_out_and_join_settle_in_three_passes() {
    let names: Vec<String> = (0..50).map(|n| format!("m{n}")).collect();
    let words = names.iter().map(|name| format!("{name}<a")).collect::<Vec<_>>().join(" ");
    let mut world = World::started(template(&format!("a {words} z<{}", names.join(","))));
    let event = world.run_step("a", success());
    assert_eq!(world.settle(vec![event], &mut all()).sends.len(), 50);
    let events: Vec<Event> = names.iter().map(|name| world.run_step(name, success())).collect();
    let plan = world.settle(events, &mut all());
    assert_eq!(plan.closed.len(), 50);
    let task_moves: Vec<&str> =
        plan.moves.iter().filter(|made| made.entity == plan.task.uuid).map(|made| made.change.event()).collect();
    assert_eq!(task_moves, ["StepCompleted", "ReadyStepsFound", "StepsEnqueued"], "it is evaluated once");
    assert_eq!(plan.sends.iter().map(|send| send.attempt).collect::<Vec<_>>(), [1]);
    assert_eq!(output(&world, "z")["steps"].as_object().unwrap().len(), 50);
    assert_eq!(world.finish_step("z", success()).task.state, TaskState::Complete);
}

#[test]
fn several_events_settle_in_one_pass() {
    let mut world = World::started(template("a b c d<a e<b"));
    let a = world.run_step("a", success());
    let b = world.run_step("b", failure("Flaky"));
    world.claim_step("c");
    world.pass(LEASE);
    check(
        &mut world,
        vec![Event::LeaseDue { step: id(2) }, b, a],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        b: enqueued_as_error_for_orchestration –ScheduleRetry→ waiting_for_retry
        c: in_progress –LeaseExpired→ enqueued
        task: steps_in_process –StepFailed→ evaluating_results
        d: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close a 1
        close b 1
        close c 1
        send c 2
        send d 1
        due retry b in 1 s",
    );
}
