//! What each event does, told as a table: the rows before come from the simulated world, the
//! plan is told in words.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::flow::{Allows, Free, Places, Rule};
use super::super::input::InputTemplate;
use super::super::plan::{HeldBy, Outcome, Plan, Room};
use super::super::retry::OnExhausted;
use super::super::simulation::{
    LEASE, QUEUE, World, event_step, failure, is_held, operator, permanent, room_for, signal_wait, success, template,
    with, with_input, with_wait,
};
use super::super::states::{StepState, TaskState};
use super::super::wait::{OnTimeout, WaitFor};
use super::Event;

/// Settles the events and compares what the plan says, line by line; the simulated world
/// checks every general rule on the way.
#[track_caller]
fn check(world: &mut World, events: Vec<Event>, mut room: Room, expected: &str) -> Plan {
    let taken: Vec<u32> = events.iter().filter_map(event_step).collect();
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
        writeln!(told, "{}: {} –{}→ {}{by}", name(made.entity), made.from, made.event, made.to).unwrap();
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

fn output(world: &World, step: &str) -> Value {
    world.step(step).input.clone().unwrap()
}

fn all() -> Room {
    Room::unlimited()
}

#[test]
fn start_sends_the_roots() {
    let mut world = World::new(template("a b c<a,b"));
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
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
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
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
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
        Room::default(),
        "
        task: pending –Start→ initializing
        task: initializing –NoDependenciesReady→ waiting_for_dependencies
        hold a: worker",
    );
    check(
        &mut world,
        vec![Event::Admit { step: 0 }],
        room_for(1, &["do.a"], true),
        "
        a: pending –Enqueue→ enqueued
        task: waiting_for_dependencies –StepsAdmitted→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 1",
    );
    let wait =
        &world.log.iter().find(|row| row.made.event == "Enqueue").unwrap().made.detail.as_ref().unwrap().waits[0];
    assert_eq!((&*wait.reason, wait.ordinal), ("worker", 1));
}

#[test]
fn start_twice_is_a_start() {
    let mut world = World::started(template("a"));
    let start = world.start_event();
    check(&mut world, vec![start], all(), "ignored 1");
}

#[test]
fn start_of_a_template_without_steps_completes() {
    let mut world = World::new(template(""));
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
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
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
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
    let Event::Start { step_uuids, .. } = world.start_event() else { unreachable!() };
    check(
        &mut world,
        vec![Event::Start { step_uuids, invalid: Some("total: must be a number".into()) }],
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
fn failure_is_retried_with_backoff() {
    let mut world = World::started(template("a"));
    let event = world.run_step("a", failure("Flaky"));
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_as_error_for_orchestration –ScheduleRetry→ waiting_for_retry
        task: steps_in_process –StepFailed→ evaluating_results
        task: evaluating_results –RetryScheduled→ waiting_for_retry
        close a 1
        due retry a in 1 s",
    );
    check(
        &mut world,
        vec![Event::RetryDue { step: 0 }],
        all(),
        "
        due retry a in 1 s",
    );
    world.pass(Duration::from_secs(1));
    check(
        &mut world,
        vec![Event::RetryDue { step: 0 }],
        Room::default(),
        "
        a: waiting_for_retry –RetryReady→ enqueued
        task: waiting_for_retry –RetryReady→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 2",
    );
    let event = world.run_step("a", failure("Flaky"));
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_as_error_for_orchestration –ScheduleRetry→ waiting_for_retry
        task: steps_in_process –StepFailed→ evaluating_results
        task: evaluating_results –RetryScheduled→ waiting_for_retry
        close a 2
        due retry a in 2 s",
    );
}

#[test]
fn a_retry_that_is_due_twice_is_sent_once() {
    let mut world = World::started(template("a"));
    world.finish_step("a", failure("Flaky"));
    world.pass(Duration::from_secs(1));
    check(
        &mut world,
        vec![Event::RetryDue { step: 0 }, Event::RetryDue { step: 0 }],
        all(),
        "
        a: waiting_for_retry –RetryReady→ enqueued
        task: waiting_for_retry –RetryReady→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 2",
    );
}

#[test]
fn a_held_step_that_is_admitted_twice_is_sent_once() {
    let mut world = World::new(template("a"));
    let start = world.start_event();
    world.settle(vec![start], &mut Room::default());
    check(
        &mut world,
        vec![Event::Admit { step: 0 }, Event::Admit { step: 0 }],
        all(),
        "
        a: pending –Enqueue→ enqueued
        task: waiting_for_dependencies –StepsAdmitted→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 1",
    );
    assert_eq!(world.task.held_steps, 0);
}

#[test]
fn a_retry_beside_running_steps_keeps_the_task_running() {
    let mut world = World::started(template("a b"));
    world.finish_step("a", failure("Flaky"));
    world.pass(Duration::from_secs(1));
    check(
        &mut world,
        vec![Event::RetryDue { step: 0 }],
        all(),
        "
        a: waiting_for_retry –RetryReady→ enqueued
        task: steps_in_process –RetryReady→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 2",
    );
}

#[test]
fn permanent_failure_fails_the_task() {
    let mut world = World::started(template("a b c<a"));
    let event = world.run_step("a", permanent("Broken"));
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_as_error_for_orchestration –Fail→ error
        task: steps_in_process –StepFailed→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        close a 1
        cancel open steps
        because Broken: step a failed: it was Broken",
    );
    assert_eq!((world.step("b").state, world.step("c").state), (StepState::Cancelled, StepState::Cancelled));
}

#[test]
fn the_last_attempt_fails_the_task() {
    let mut world = World::started(with(template("a"), "a", |a| a.retry.max_attempts = 1));
    let event = world.run_step("a", failure("Flaky"));
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_as_error_for_orchestration –Fail→ error
        task: steps_in_process –AllStepsCompleted→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        close a 1
        cancel open steps
        because Flaky: step a failed: it was Flaky",
    );
}

#[test]
fn permanent_failure_blocks_where_its_policy_says_so() {
    let definition = with(template("a b<a c"), "a", |a| {
        a.retry.on_exhausted = OnExhausted::Block;
    });
    let mut world = World::started(definition);
    let event = world.run_step("a", permanent("Broken"));
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_as_error_for_orchestration –Fail→ error
        task: steps_in_process –StepFailed→ evaluating_results
        task: evaluating_results –StepsStillRunning→ steps_in_process
        close a 1
        because Broken: step a failed: it was Broken",
    );
    let event = world.run_step("c", success());
    check(
        &mut world,
        vec![event],
        all(),
        "
        c: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        task: evaluating_results –PermanentFailure→ blocked_by_failures
        close c 1
        because Broken: step a failed: it was Broken",
    );
}

#[test]
fn permanent_failure_is_passed_over_where_its_policy_says_so() {
    let definition = with(template("a b<a"), "a", |a| {
        a.retry.on_exhausted = OnExhausted::Continue;
    });
    let mut world = World::started(definition);
    let event = world.run_step("a", permanent("Broken"));
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_as_error_for_orchestration –Fail→ error
        task: steps_in_process –StepFailed→ evaluating_results
        b: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close a 1
        send b 1",
    );
    world.finish_step("b", success());
    assert_eq!(world.task.state, TaskState::Complete);
}

#[test]
fn a_missing_input_path_fails_the_step_before_it_is_sent() {
    let definition = with_input(template("a b<a c"), "b", &json!({"x": "${steps.a.output.hold}"}));
    let mut world = World::started(definition);
    let event = world.run_step("a", success());
    let plan = check(&mut world, vec![event], all(), "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        b: pending –Fail→ error
        task: evaluating_results –PermanentFailure→ error
        close a 1
        cancel open steps
        because missing_input: step b failed: input.x reads ${steps.a.output.hold}, but steps.a.output has no key `hold`");
    assert_eq!(plan.task.failed_steps, 1);
    assert_eq!(world.step("c").state, StepState::Cancelled);
}

#[test]
fn what_was_about_to_be_sent_beside_a_missing_input_is_cancelled() {
    let definition = with_input(template("a b"), "b", &json!({"x": "${input.nothing}"}));
    let mut world = World::new(definition);
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
        all(),
        "
        task: pending –Start→ initializing
        a: pending –Enqueue→ enqueued
        b: pending –Fail→ error
        task: initializing –InvalidInput→ error
        cancel open steps
        because missing_input: step b failed: input.x reads ${input.nothing}, but input has no key `nothing`",
    );
    let a = world.step("a");
    assert_eq!(
        (a.state, a.enqueued_task_version),
        (StepState::Cancelled, None),
        "the move that would have sent it never was"
    );
    assert!(world.messages.is_empty());
}

#[test]
fn a_missing_input_of_a_root_blocks_where_the_template_says_so() {
    let mut definition = with_input(template("a b<a"), "a", &json!({"x": "${input.nothing}"}));
    definition.block_on_failure = true;
    let mut world = World::new(definition);
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
        all(),
        "
        task: pending –Start→ initializing
        a: pending –Fail→ error
        task: initializing –NoDependenciesReady→ waiting_for_dependencies
        task: waiting_for_dependencies –StepFailed→ evaluating_results
        task: evaluating_results –PermanentFailure→ blocked_by_failures
        because missing_input: step a failed: input.x reads ${input.nothing}, but input has no key `nothing`",
    );
}

#[test]
fn an_expired_lease_sends_the_step_again() {
    let mut world = World::started(template("a"));
    let claim = world.claim_step("a");
    world.pass(LEASE);
    check(
        &mut world,
        vec![Event::LeaseDue { step: 0 }],
        Room::default(),
        "
        a: in_progress –LeaseExpired→ enqueued
        task: steps_in_process –AttemptLost→ evaluating_results
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close a 1
        send a 2",
    );
    let a = world.step("a");
    assert_eq!((a.attempt, a.failures, a.losses, a.claim_token), (2, 0, 1, None));
    assert!(!world.report(claim, success()), "its report comes too late");
}

#[test]
fn a_lost_attempt_beside_a_fatal_failure_leaves_a_row_that_tells_the_log() {
    let mut world = World::started(template("a b"));
    world.claim_step("a");
    let event = world.run_step("b", permanent("Broken"));
    world.pass(LEASE);
    check(
        &mut world,
        vec![Event::LeaseDue { step: 0 }, event],
        all(),
        "
        b: enqueued_as_error_for_orchestration –Fail→ error
        a: in_progress –LeaseExpired→ enqueued
        task: steps_in_process –StepFailed→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        close b 1
        close a 1
        cancel open steps
        because Broken: step b failed: it was Broken",
    );
    let a = world.step("a");
    assert_eq!((a.state, a.attempt, a.enqueued_event), (StepState::Cancelled, 2, Some("LeaseExpired")));
    assert_eq!((a.claim_token, a.enqueued_task_version), (None, None));
}

#[test]
fn a_renewed_lease_is_looked_at_again() {
    let mut world = World::started(template("a"));
    let claim = world.claim_step("a");
    world.pass(Duration::from_secs(6));
    assert!(world.heartbeat(claim));
    world.pass(Duration::from_secs(4));
    check(
        &mut world,
        vec![Event::LeaseDue { step: 0 }],
        all(),
        "
        due lease a in 6 s",
    );
}

#[test]
fn a_report_that_came_before_the_lease_was_looked_at_wins() {
    let mut world = World::started(template("a"));
    let claim = world.claim_step("a");
    world.pass(LEASE * 2);
    assert!(world.report(claim, success()));
    check(
        &mut world,
        vec![Event::LeaseDue { step: 0 }, Event::Result { step: 0, attempt: 1 }],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –AllStepsCompleted→ evaluating_results
        task: evaluating_results –AllStepsSuccessful→ complete
        close a 1
        ignored 1",
    );
}

#[test]
fn a_worker_that_only_renews_is_stopped_after_its_run_time_and_a_lease() {
    let mut world = World::started(template("a"));
    let claim = world.claim_step("a");
    for _ in 0..8 {
        world.pass(Duration::from_secs(5));
        world.heartbeat(claim);
    }
    check(
        &mut world,
        vec![Event::LeaseDue { step: 0 }],
        all(),
        "
        a: in_progress –RunTimeout→ waiting_for_retry
        task: steps_in_process –StepFailed→ evaluating_results
        task: evaluating_results –RetryScheduled→ waiting_for_retry
        close a 1
        due retry a in 1 s",
    );
    assert!(!world.report(claim, success()));
}

#[test]
fn a_run_timeout_of_the_last_attempt_fails_the_step() {
    let mut world = World::started(with(template("a"), "a", |a| a.retry.max_attempts = 1));
    let claim = world.claim_step("a");
    world.pass(Duration::from_secs(41));
    world.heartbeat(claim);
    check(
        &mut world,
        vec![Event::LeaseDue { step: 0 }],
        all(),
        "
        a: in_progress –RunTimeout→ error
        task: steps_in_process –AllStepsCompleted→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        close a 1
        cancel open steps
        because timeout: step a failed: it ran longer than 30s and its worker never said so",
    );
}

#[test]
fn a_step_that_nobody_claims_times_out() {
    let mut world = World::started(with(template("a"), "a", |a| {
        a.queue_timeout = Some(Duration::from_mins(1));
    }));
    check(
        &mut world,
        vec![Event::QueueDue { step: 0, attempt: 1 }],
        all(),
        "
        due queue_timeout a in 60 s",
    );
    world.pass(Duration::from_mins(1));
    check(
        &mut world,
        vec![Event::QueueDue { step: 0, attempt: 1 }],
        all(),
        "
        a: enqueued –QueueTimeout→ error
        task: steps_in_process –AllStepsCompleted→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        close a 1
        cancel open steps
        because queue_timeout: step a failed: no worker claimed it within 60s",
    );
}

#[test]
fn a_queue_timeout_that_is_passed_over_is_still_a_failure() {
    let definition = with(template("a b<a c"), "a", |a| {
        a.queue_timeout = Some(Duration::from_mins(1));
        a.retry.on_exhausted = OnExhausted::Continue;
    });
    let mut world = World::started(definition);
    world.pass(Duration::from_mins(1));
    check(
        &mut world,
        vec![Event::QueueDue { step: 0, attempt: 1 }],
        all(),
        "
        a: enqueued –QueueTimeout→ error
        task: steps_in_process –StepFailed→ evaluating_results
        b: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close a 1
        send b 1",
    );
}

#[test]
fn a_claimed_step_does_not_time_out_in_its_queue() {
    let mut world = World::started(with(template("a"), "a", |a| {
        a.queue_timeout = Some(Duration::from_mins(1));
    }));
    world.pass(Duration::from_secs(61));
    world.claim_step("a");
    check(&mut world, vec![Event::QueueDue { step: 0, attempt: 1 }], all(), "ignored 1");
}

#[test]
fn a_task_that_takes_too_long_ends() {
    let mut definition = template("a b<a");
    definition.total = Some(Duration::from_hours(1));
    let mut world = World::started(definition);
    check(
        &mut world,
        vec![Event::TotalDue],
        all(),
        "
        due total_timeout in 3600 s",
    );
    world.pass(Duration::from_hours(1));
    check(
        &mut world,
        vec![Event::TotalDue],
        all(),
        "
        task: steps_in_process –TotalTimeout→ error
        cancel open steps
        because timeout: it took longer than the 3600s its template allows",
    );
    check(&mut world, vec![Event::TotalDue], all(), "ignored 1");
}

#[test]
fn cancel_ends_the_task_at_once() {
    let mut world = World::started(template("a b<a"));
    let claim = world.claim_step("a");
    check(
        &mut world,
        vec![Event::Cancel(operator("carl"))],
        all(),
        "
        task: steps_in_process –Cancel→ cancelled by carl
        cancel open steps
        audit cancel by carl
        because no error: because",
    );
    assert_eq!(world.task.ended_by, Some("cancel"));
    assert!(!world.heartbeat(claim) && !world.report(claim, success()));
    check(&mut world, vec![Event::Cancel(operator("carl"))], all(), "ignored 1");
}

#[test]
fn terminate_ends_the_task_at_once() {
    let mut world = World::new(template("a"));
    check(
        &mut world,
        vec![Event::Terminate(operator("tina"))],
        all(),
        "
        task: pending –Terminate→ cancelled by tina
        cancel open steps
        audit terminate by tina
        because no error: because",
    );
    assert_eq!(world.task.ended_by, Some("terminate"));
}

#[test]
fn what_was_reported_counts_before_the_task_is_cancelled() {
    let mut world = World::started(template("a b<a"));
    let event = world.run_step("a", success());
    check(
        &mut world,
        vec![Event::Cancel(operator("carl")), event],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –Cancel→ cancelled by carl
        close a 1
        cancel open steps
        audit cancel by carl
        because no error: because",
    );
    assert_eq!(world.step("b").state, StepState::Cancelled);
}

#[test]
fn a_start_that_is_cancelled_at_once_leaves_no_open_step() {
    let mut world = World::new(template("a b<a"));
    let start = world.start_event();
    check(
        &mut world,
        vec![Event::Cancel(operator("carl")), start],
        all(),
        "
        task: pending –Start→ initializing
        task: initializing –Cancel→ cancelled by carl
        cancel open steps
        audit cancel by carl
        because no error: because",
    );
    assert!(world.steps.iter().all(|step| step.state == StepState::Cancelled));
}

#[test]
fn an_operator_retries_a_failed_task() {
    let mut world = World::started(template("a b<a c d<c"));
    world.finish_step("c", success());
    world.finish_step("a", permanent("Broken"));
    let retry = world.retry_event();
    check(
        &mut world,
        vec![retry],
        all(),
        "
        task: error –OperatorRetry→ evaluating_results by olga
        a: error –OperatorRetry→ pending by olga
        b: cancelled –OperatorRetry→ pending by olga
        d: cancelled –OperatorRetry→ pending by olga
        a: pending –Enqueue→ enqueued
        d: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 2
        send d 2
        audit retry by olga of [\"a\",\"b\",\"d\"]",
    );
    assert_eq!((world.task.generation, world.step("a").failures), (2, 0));
    assert_eq!(world.step("c").generation, 1, "what is done stays done");
    assert_eq!(output(&world, "d"), json!({"input": {"total": 7}, "steps": {"c": {"n": 1}}}));
}

#[test]
fn an_operator_retries_a_cancelled_task() {
    let mut world = World::started(template("a b<a"));
    world.settle(vec![Event::Cancel(operator("carl"))], &mut all());
    let retry = world.retry_event();
    check(
        &mut world,
        vec![retry],
        Room::default(),
        "
        task: cancelled –OperatorRetry→ evaluating_results by olga
        a: cancelled –OperatorRetry→ pending by olga
        b: cancelled –OperatorRetry→ pending by olga
        task: evaluating_results –NoDependenciesReady→ waiting_for_dependencies
        hold a: worker
        audit retry by olga of [\"a\",\"b\"]",
    );
    assert_eq!(world.task.ended_by, None);
}

#[test]
fn an_operator_retries_a_blocked_task_within_its_generation() {
    let definition = with(template("a b<a"), "a", |a| {
        a.retry.on_exhausted = OnExhausted::Block;
    });
    let mut world = World::started(definition);
    world.finish_step("a", permanent("Broken"));
    assert_eq!(world.task.state, TaskState::BlockedByFailures);
    let retry = world.retry_event();
    check(
        &mut world,
        vec![retry],
        all(),
        "
        task: blocked_by_failures –OperatorRetry→ evaluating_results by olga
        a: error –OperatorRetry→ pending by olga
        a: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 2
        audit retry by olga of [\"a\"]",
    );
    assert_eq!((world.task.generation, world.task.failed_steps), (1, 0));
}

#[test]
fn a_step_behind_a_failure_that_was_passed_over_waits_for_its_retry() {
    let definition = with(template("a b c<a,b"), "a", |a| {
        a.retry.on_exhausted = OnExhausted::Continue;
    });
    let definition = with(definition, "b", |b| {
        b.retry.on_exhausted = OnExhausted::Block;
    });
    let mut world = World::started(definition);
    world.finish_step("a", permanent("Broken"));
    world.finish_step("b", permanent("Broken"));
    assert_eq!((world.task.state, world.step("c").remaining_dependencies), (TaskState::BlockedByFailures, 1));
    let retry = world.retry_event();
    world.settle(vec![retry], &mut all());
    assert_eq!(world.step("c").remaining_dependencies, 2);
    let event = world.run_step("a", success());
    check(
        &mut world,
        vec![event],
        all(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        task: evaluating_results –StepsStillRunning→ steps_in_process
        close a 2",
    );
}

#[test]
fn an_operator_retries_a_task_that_never_had_steps() {
    let mut world = World::new(template("a b<a"));
    world.settle(vec![Event::Cancel(operator("carl"))], &mut all());
    let retry = world.retry_event();
    check(
        &mut world,
        vec![retry],
        all(),
        "
        task: cancelled –OperatorRetry→ evaluating_results by olga
        a: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 1
        audit retry by olga",
    );
    assert_eq!((world.steps.len(), world.task.open_steps), (2, 2));
}

#[test]
fn an_operator_retries_a_task_whose_input_is_still_invalid() {
    let mut world = World::new(template("a"));
    world.settle(vec![Event::Cancel(operator("carl"))], &mut all());
    let Event::Retry { operator, step_uuids, .. } = world.retry_event() else { unreachable!() };
    let retry =
        Event::Retry { operator, only: Vec::new(), step_uuids, invalid: Some("total: must be a number".into()) };
    check(
        &mut world,
        vec![retry],
        all(),
        "
        task: cancelled –OperatorRetry→ evaluating_results by olga
        task: evaluating_results –PermanentFailure→ error
        cancel open steps
        audit retry by olga
        because invalid_input: total: must be a number",
    );
}

#[test]
fn an_operator_does_not_retry_what_runs() {
    let mut world = World::started(template("a"));
    let retry = world.retry_event();
    check(&mut world, vec![retry], all(), "ignored 1");
}

#[test]
fn a_retry_never_revives_what_the_same_settle_ends() {
    let mut world = World::started(template("a"));
    let retry = world.retry_event();
    check(
        &mut world,
        vec![Event::Cancel(operator("carl")), retry],
        all(),
        "
        task: steps_in_process –Cancel→ cancelled by carl
        cancel open steps
        audit cancel by carl
        because no error: because
        ignored 1",
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
    world.settle(vec![Event::LeaseDue { step: 0 }], &mut all());
    assert!(!world.report(claim, success()));
    world.run_step("a", success());
    check(
        &mut world.clone(),
        vec![Event::Result { step: 0, attempt: 1 }, Event::Result { step: 0, attempt: 3 }],
        all(),
        "ignored 2",
    );
    check(
        &mut world,
        vec![Event::Result { step: 0, attempt: 2 }],
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
        vec![Event::Admit { step: 2 }],
        room_for(0, &["do.c"], true),
        "
        hold c: room",
    );
    check(
        &mut world,
        vec![Event::Admit { step: 2 }],
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
    let quarantined = |attempt| Event::Quarantined { step: 0, attempt, reason: "not JSON".into() };
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
        plan.moves.iter().filter(|made| made.entity == plan.task.uuid).map(|made| made.event).collect();
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
        vec![Event::LeaseDue { step: 2 }, b, a],
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

fn paused() -> Room {
    let mut room = Room::unlimited();
    room.set_paused([QUEUE.to_owned()].into());
    room
}

#[test]
fn what_becomes_ready_for_a_paused_queue_is_held_until_it_goes_on() {
    let mut world = World::started(template("a b<a"));
    let done = world.run_step("a", success());
    check(
        &mut world,
        vec![done],
        paused(),
        "
        a: enqueued_for_orchestration –Complete→ complete
        task: steps_in_process –StepCompleted→ evaluating_results
        task: evaluating_results –NoDependenciesReady→ waiting_for_dependencies
        close a 1
        hold b: paused",
    );
    let admit = || vec![Event::Admit { step: 1 }];
    check(&mut world, admit(), paused(), "hold b: paused");
    let plan = check(
        &mut world,
        admit(),
        all(),
        "
        b: pending –Enqueue→ enqueued
        task: waiting_for_dependencies –StepsAdmitted→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send b 1",
    );
    assert_eq!(waits(&plan, "Enqueue"), ["paused"]);
}

#[test]
fn a_retry_for_a_paused_queue_is_held_as_it_is() {
    let mut world = World::started(template("a"));
    let failed = world.finish_step("a", failure("Flaky"));
    assert_eq!(failed.task.state, TaskState::WaitingForRetry);
    world.pass(Duration::from_secs(2));
    let due = || vec![Event::RetryDue { step: 0 }];
    check(&mut world, due(), paused(), "hold a: paused");
    assert_eq!((world.step("a").state, world.task.held_steps), (StepState::WaitingForRetry, 1));
    check(&mut world, due(), all(), "ignored 1");
    let plan = check(
        &mut world,
        vec![Event::Admit { step: 0 }],
        all(),
        "
        a: waiting_for_retry –RetryReady→ enqueued
        task: waiting_for_retry –StepsAdmitted→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send a 2",
    );
    assert_eq!(waits(&plan, "RetryReady"), ["retry", "paused"]);
    assert_eq!(world.task.held_steps, 0);
}

#[test]
fn a_lost_attempt_goes_out_again_whatever_is_paused() {
    let mut world = World::started(template("a"));
    world.claim_step("a");
    world.pass(LEASE);
    check(
        &mut world,
        vec![Event::LeaseDue { step: 0 }],
        paused(),
        "
        a: in_progress –LeaseExpired→ enqueued
        task: steps_in_process –AttemptLost→ evaluating_results
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        close a 1
        send a 2",
    );
}

/// Room for everything under a limit of the namespace that has so many places left.
fn under_limit(left: i64) -> Room {
    let mut room = room_for(100, &["do.a", "do.b", "do.c"], false);
    room.set_limits(["shop".to_owned()].into());
    let mut places = Places::default();
    places.set("shop".into(), Free { limit_id: 7, places: Some(left), tokens: None });
    room.set_places(places);
    room
}

#[test]
fn what_is_limited_is_held_first_and_sent_as_far_as_there_are_places() {
    let mut world = World::new(template("a b c"));
    let start = world.start_event();
    let plan = check(
        &mut world,
        vec![start],
        under_limit(9),
        "
        task: pending –Start→ initializing
        task: initializing –NoDependenciesReady→ waiting_for_dependencies
        hold a: limit
        hold b: limit
        hold c: limit",
    );
    assert_eq!(
        plan.lanes.iter().map(|(_, lane)| lane.as_str()).collect::<Vec<_>>(),
        ["\u{1f}do.a", "\u{1f}do.b", "\u{1f}do.c"]
    );
    let admit = (0..3).map(|step| Event::Admit { step }).collect();
    let plan = check(
        &mut world,
        admit,
        under_limit(2),
        "
        a: pending –Enqueue→ enqueued
        b: pending –Enqueue→ enqueued
        task: waiting_for_dependencies –StepsAdmitted→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        hold c: limit
        send a 1
        send b 1",
    );
    assert_eq!(waits(&plan, "Enqueue"), ["limit"]);
    assert!(plan.lanes.is_empty(), "they are in their lanes already");
}

#[test]
fn a_retry_takes_its_turn_under_the_limit_and_a_lost_attempt_keeps_its_place() {
    let mut world = World::started(template("a b"));
    let failed = world.run_step("a", failure("Flaky"));
    world.results.clear();
    world.settle(vec![failed], &mut under_limit(0));
    world.pass(Duration::from_secs(2));
    check(&mut world, vec![Event::RetryDue { step: 0 }], under_limit(5), "hold a: limit");
    check(&mut world, vec![Event::Admit { step: 0 }], under_limit(0), "hold a: limit");
    world.claim_step("b");
    world.pass(LEASE);
    let plan = world.settle(vec![Event::LeaseDue { step: 1 }], &mut under_limit(0));
    assert_eq!(plan.sends.iter().map(|send| send.attempt).collect::<Vec<_>>(), [2]);
    let plan = world.settle(vec![Event::Admit { step: 0 }], &mut under_limit(1));
    assert_eq!(waits(&plan, "RetryReady"), ["retry", "limit"]);
}

#[test]
fn a_key_names_the_limit_and_one_that_leads_nowhere_fails_its_step() {
    let keyed = |key: &str| {
        with(template("a"), "a", |step| {
            let key = InputTemplate::parse(&json!(key)).unwrap();
            let allows = Allows::AtOnce(2);
            step.limits = vec![Rule { scope: "shop/order.a".into(), key: Some(key), allows }];
        })
    };
    let mut definition = keyed("${input.total}");
    definition.fair_key = Some(InputTemplate::parse(&json!("t${input.total}")).unwrap());
    assert_eq!(definition.lane(0, &json!({"total": 7})).unwrap(), "t7\u{1f}do.a\u{1f}shop/order.a/7");
    for input in [json!({"total": null}), json!({"total": []}), json!({"total": ""}), json!({"total": "x".repeat(201)})]
    {
        definition.limits(0, &input).expect_err("no key");
    }
    let mut world = World::new(keyed("${input.nobody}"));
    let start = world.start_event();
    let plan = world.settle(vec![start], &mut under_limit(9));
    assert_eq!((plan.task.state, world.step("a").state), (TaskState::Error, StepState::Error));
    assert!(plan.task.reason.as_ref().unwrap().contains("concurrency.key: "), "{:?}", plan.task.reason);
}

/// The reasons of the waits that a move of this event ended.
fn waits(plan: &Plan, event: &str) -> Vec<String> {
    let made = plan.moves.iter().find(|made| made.event == event).expect("the move was made");
    made.detail.iter().flat_map(|detail| &detail.waits).map(|wait| wait.reason.clone()).collect()
}

// Waits.

fn sleeping() -> World {
    World::started(with_wait(template("a b<a"), "a", WaitFor::Sleep(Duration::from_hours(72))))
}

#[test]
fn a_sleep_begins_without_a_message() {
    let mut world = World::new(with_wait(template("a b<a"), "a", WaitFor::Sleep(Duration::from_hours(72))));
    let start = world.start_event();
    check(
        &mut world,
        vec![start],
        Room::default(),
        "
        task: pending –Start→ initializing
        a: pending –BeginWait→ waiting
        task: initializing –NoDependenciesReady→ waiting_for_dependencies
        due timer a in 259200 s",
    );
}

#[test]
fn a_timer_that_fires_early_is_put_off_and_one_that_is_due_starts_what_follows() {
    let mut world = sleeping();
    check(&mut world, vec![Event::TimerDue { step: 0 }], all(), "due timer a in 259200 s");
    world.pass(Duration::from_hours(72));
    check(
        &mut world,
        vec![Event::TimerDue { step: 0 }],
        all(),
        "
        a: waiting –TimerFired→ complete
        task: waiting_for_dependencies –StepCompleted→ evaluating_results
        b: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send b 1",
    );
    assert!(output(&world, "b")["steps"]["a"]["fired_at"].is_string());
    check(&mut world, vec![Event::TimerDue { step: 0 }], all(), "ignored 1");
}

#[test]
fn a_time_in_the_past_fires_at_once_and_no_time_fails_the_step() {
    let until = |at: &str| {
        let definition = with_wait(template("a"), "a", WaitFor::Until("${input.at}".into()));
        let mut world = World::new(with_input(definition, "a", &json!({"until": "${input.at}"})));
        world.task.input = json!({"at": at});
        let start = world.start_event();
        world.settle(vec![start], &mut Room::unlimited());
        world
    };
    let mut past = until("2001-01-01T00:00:00+02:00");
    past.settle(vec![Event::TimerDue { step: 0 }], &mut all());
    assert_eq!(past.task.state, TaskState::Complete);
    for bad in ["tomorrow", "2026-01-05 12:00", "3026-01-05T12:00:00Z"] {
        let failed = until(bad);
        assert_eq!((failed.task.state, failed.task.error_type.as_deref()), (TaskState::Error, Some("invalid_until")));
    }
}

fn approving(timeout: Option<Duration>, late: OnTimeout) -> World {
    World::started(with_wait(template("a b<a"), "a", signal_wait("ok", &["yes", "no"], timeout, late)))
}

#[test]
fn a_signal_ends_the_wait_and_says_who_sent_it() {
    let mut world = approving(None, OnTimeout::Fail);
    world.signal("other", json!({"answer": "yes"}));
    world.signal("ok", json!({"answer": "perhaps"}));
    check(&mut world, vec![Event::SignalDue], all(), "ignored 1");
    world.signal("ok", json!({"answer": "yes"}));
    world.signal("ok", json!({"answer": "no"}));
    check(
        &mut world,
        vec![Event::SignalDue, Event::SignalDue],
        all(),
        "
        a: waiting –SignalReceived→ complete by sam
        task: waiting_for_dependencies –StepCompleted→ evaluating_results
        b: pending –Enqueue→ enqueued
        task: evaluating_results –ReadyStepsFound→ enqueuing_steps
        task: enqueuing_steps –StepsEnqueued→ steps_in_process
        send b 1
        ignored 1",
    );
    assert_eq!(output(&world, "b")["steps"]["a"], json!({"answer": "yes"}));
    assert_eq!(world.signals.len(), 3, "one signal ends one wait");
}

#[test]
fn a_signal_that_came_early_is_used_when_the_wait_begins() {
    let mut world = World::new(with_wait(template("a b<a"), "b", signal_wait("ok", &[], None, OnTimeout::Fail)));
    world.signal("ok", json!(1));
    let start = world.start_event();
    world.settle(vec![start, Event::SignalDue], &mut all());
    let plan = world.finish_step("a", success());
    assert_eq!(plan.due.iter().map(|due| due.kind).collect::<Vec<_>>(), ["signal"]);
    check(
        &mut world,
        vec![Event::SignalDue],
        all(),
        "
        b: waiting –SignalReceived→ complete by sam
        task: waiting_for_dependencies –StepCompleted→ evaluating_results
        task: evaluating_results –AllStepsSuccessful→ complete",
    );
}

#[test]
fn a_signal_that_never_comes_fails_the_step_or_lets_it_go_on() {
    let hour = Some(Duration::from_hours(1));
    let mut world = approving(hour, OnTimeout::Fail);
    world.pass(Duration::from_hours(2));
    check(
        &mut world,
        vec![Event::TimerDue { step: 0 }],
        all(),
        "
        a: waiting –TimerFired→ error
        task: waiting_for_dependencies –StepFailed→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        cancel open steps
        because timeout: step a failed: no signal ok came within 3600s",
    );
    let mut world = approving(hour, OnTimeout::Continue);
    world.pass(Duration::from_hours(2));
    world.signal("ok", json!({"answer": "no"}));
    world.settle(vec![Event::TimerDue { step: 0 }, Event::SignalDue], &mut all());
    assert_eq!(output(&world, "b")["steps"]["a"], json!({"answer": "no"}), "late, but before the timer was settled");
    let mut world = approving(hour, OnTimeout::Continue);
    world.pass(Duration::from_hours(2));
    world.settle(vec![Event::TimerDue { step: 0 }], &mut all());
    assert_eq!(output(&world, "b")["steps"]["a"], json!({"timed_out": true}));
}

#[test]
fn a_wait_ends_beside_a_running_step_and_with_its_cancelled_task() {
    let mut world = World::started(with_wait(template("a b c<a"), "a", WaitFor::Sleep(Duration::from_secs(5))));
    assert_eq!(world.task.state, TaskState::StepsInProcess);
    world.pass(Duration::from_secs(5));
    let plan = world.settle(vec![Event::TimerDue { step: 0 }], &mut all());
    assert_eq!(plan.sends.len(), 1);
    let mut world = sleeping();
    world.settle(vec![Event::Cancel(operator("carl"))], &mut all());
    let cancelled = world.log.iter().find(|row| row.made.from == "waiting").unwrap();
    assert_eq!(cancelled.made.detail.as_ref().unwrap().waits[0].reason, "timer");
    // An operator's retry waits anew.
    let retry = world.retry_event();
    world.settle(vec![retry], &mut all());
    assert_eq!((world.step("a").state, world.step("a").attempt), (StepState::Waiting, 2));
}
