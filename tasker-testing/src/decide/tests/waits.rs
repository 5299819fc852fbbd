//! Steps that wait for a time or a signal.

use super::*;

fn sleeping() -> World {
    World::started(with_wait(template("a b<a"), "a", WaitFor::Sleep(Duration::from_hours(72))))
}

#[test]
fn a_sleep_begins_without_a_message() {
    let mut world = World::new(with_wait(template("a b<a"), "a", WaitFor::Sleep(Duration::from_hours(72))));
    check(
        &mut world,
        vec![Event::Start],
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
    check(&mut world, vec![Event::TimerDue { step: id(0) }], all(), "due timer a in 259200 s");
    world.pass(Duration::from_hours(72));
    check(
        &mut world,
        vec![Event::TimerDue { step: id(0) }],
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
    check(&mut world, vec![Event::TimerDue { step: id(0) }], all(), "ignored 1");
}

#[test]
fn a_time_in_the_past_fires_at_once_and_no_time_fails_the_step() {
    let until = |at: &str| {
        let definition = with_wait(template("a"), "a", WaitFor::Until("${input.at}".into()));
        let mut world = World::new(with_input(definition, "a", &json!({"until": "${input.at}"})));
        world.task.input = json!({"at": at});
        world.settle(vec![Event::Start], &mut Room::unlimited());
        world
    };
    let mut past = until("2001-01-01T00:00:00+02:00");
    past.settle(vec![Event::TimerDue { step: id(0) }], &mut all());
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
    world.settle(vec![Event::Start, Event::SignalDue], &mut all());
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
        vec![Event::TimerDue { step: id(0) }],
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
    world.settle(vec![Event::TimerDue { step: id(0) }, Event::SignalDue], &mut all());
    assert_eq!(output(&world, "b")["steps"]["a"], json!({"answer": "no"}), "late, but before the timer was settled");
    let mut world = approving(hour, OnTimeout::Continue);
    world.pass(Duration::from_hours(2));
    world.settle(vec![Event::TimerDue { step: id(0) }], &mut all());
    assert_eq!(output(&world, "b")["steps"]["a"], json!({"timed_out": true}));
}

#[test]
fn a_wait_ends_beside_a_running_step_and_with_its_cancelled_task() {
    let mut world = World::started(with_wait(template("a b c<a"), "a", WaitFor::Sleep(Duration::from_secs(5))));
    assert_eq!(world.task.state, TaskState::StepsInProcess);
    world.pass(Duration::from_secs(5));
    let plan = world.settle(vec![Event::TimerDue { step: id(0) }], &mut all());
    assert_eq!(plan.sends.len(), 1);
    let mut world = sleeping();
    world.settle(vec![Event::Cancel(operator("carl"))], &mut all());
    let cancelled = world.log.iter().find(|row| row.made.change.from() == "waiting").unwrap();
    assert_eq!(cancelled.made.detail.as_ref().unwrap().waits[0].reason, "timer");
    // An operator's retry waits anew.
    let retry = World::retry_event();
    world.settle(vec![retry], &mut all());
    assert_eq!((world.step("a").state, world.step("a").attempt), (StepState::Waiting, 2));
}
