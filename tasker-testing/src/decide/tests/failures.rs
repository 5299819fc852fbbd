//! Failures and losses: retries, leases, timeouts, and what follows where nothing is left to try.

use super::*;
use tasker_shared::state_machine::states::StepEvent;

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
        vec![Event::RetryDue { step: id(0) }],
        all(),
        "
        due retry a in 1 s",
    );
    world.pass(Duration::from_secs(1));
    check(
        &mut world,
        vec![Event::RetryDue { step: id(0) }],
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
        vec![Event::RetryDue { step: id(0) }, Event::RetryDue { step: id(0) }],
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
    world.settle(vec![Event::Start], &mut Room::default());
    check(
        &mut world,
        vec![Event::Admit { step: id(0) }, Event::Admit { step: id(0) }],
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
        vec![Event::RetryDue { step: id(0) }],
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
    check(
        &mut world,
        vec![Event::Start],
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
    check(
        &mut world,
        vec![Event::Start],
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
        vec![Event::LeaseDue { step: id(0) }],
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
        vec![Event::LeaseDue { step: id(0) }, event],
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
    assert_eq!((a.state, a.attempt, a.enqueued_event), (StepState::Cancelled, 2, Some(StepEvent::LeaseExpired)));
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
        vec![Event::LeaseDue { step: id(0) }],
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
        vec![Event::LeaseDue { step: id(0) }, Event::Result { step: id(0), attempt: 1 }],
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
        vec![Event::LeaseDue { step: id(0) }],
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
        vec![Event::LeaseDue { step: id(0) }],
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
        vec![Event::QueueDue { step: id(0) }],
        all(),
        "
        due queue_timeout a in 60 s",
    );
    world.pass(Duration::from_mins(1));
    check(
        &mut world,
        vec![Event::QueueDue { step: id(0) }],
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
fn a_step_that_nobody_offers_to_run_times_out_without_being_sent() {
    let mut world = World::new(with(template("a"), "a", |a| {
        a.queue_timeout = Some(Duration::from_mins(1));
    }));
    let due = || vec![Event::QueueDue { step: id(0) }];
    let plan = world.settle(vec![Event::Start], &mut room_for(9, &["do.other"], false));
    assert_eq!(plan.due.iter().map(|due| due.kind).collect::<Vec<_>>(), ["queue_timeout"]);
    world.pass(Duration::from_secs(59));
    check(&mut world, due(), all(), "due queue_timeout a in 1 s");
    world.pass(Duration::from_secs(1));
    let plan = check(
        &mut world,
        due(),
        all(),
        "
        a: pending –QueueTimeout→ error
        task: waiting_for_dependencies –StepFailed→ evaluating_results
        task: evaluating_results –PermanentFailure→ error
        cancel open steps
        because queue_timeout: step a failed: it was not sent within 60s: no worker offers its handler",
    );
    assert_eq!(waits(&plan, "QueueTimeout"), ["worker"]);
    assert_eq!(world.task.held_steps, 0);
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
        vec![Event::QueueDue { step: id(0) }],
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
    check(&mut world, vec![Event::QueueDue { step: id(0) }], all(), "ignored 1");
}
