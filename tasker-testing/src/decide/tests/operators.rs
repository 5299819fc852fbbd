//! What ends a task from outside, and what a person does to one that has failed.

use super::*;

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
    check(
        &mut world,
        vec![Event::Cancel(operator("carl")), Event::Start],
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
    let retry = World::retry_event();
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
    let retry = World::retry_event();
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
    let retry = World::retry_event();
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
    let retry = World::retry_event();
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
    let retry = World::retry_event();
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
    world.invalid_input = Some("total: must be a number".into());
    let retry = World::retry_event();
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
    let retry = World::retry_event();
    check(&mut world, vec![retry], all(), "ignored 1");
}

#[test]
fn a_retry_never_revives_what_the_same_settle_ends() {
    let mut world = World::started(template("a"));
    let retry = World::retry_event();
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
