//! Pauses and limits: what is held, and when it goes on.

use super::*;

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
    let admit = || vec![Event::Admit { step: id(1) }];
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
    let due = || vec![Event::RetryDue { step: id(0) }];
    check(&mut world, due(), paused(), "hold a: paused");
    assert_eq!((world.step("a").state, world.task.held_steps), (StepState::WaitingForRetry, 1));
    check(&mut world, due(), all(), "ignored 1");
    let plan = check(
        &mut world,
        vec![Event::Admit { step: id(0) }],
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
        vec![Event::LeaseDue { step: id(0) }],
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

/// Room for everything under a limit of the namespace that has so many slots left.
fn under_limit(left: i64) -> Room {
    let mut room = room_for(100, &["do.a", "do.b", "do.c"], false);
    room.set_limits(["shop".to_owned()].into());
    let mut slots = LimitSlots::default();
    slots.set("shop".into(), Free { limit_id: 7, slots: Some(left), tokens: None });
    room.set_limit_slots(slots);
    room
}

#[test]
fn what_is_limited_is_held_first_and_sent_as_far_as_there_are_places() {
    let mut world = World::new(template("a b c"));
    let plan = check(
        &mut world,
        vec![Event::Start],
        under_limit(9),
        "
        task: pending –Start→ initializing
        task: initializing –NoDependenciesReady→ waiting_for_dependencies
        hold a: limit
        hold b: limit
        hold c: limit",
    );
    assert_eq!(
        plan.hold_groups.iter().map(|(_, group)| group.as_str()).collect::<Vec<_>>(),
        ["\u{1f}do.a", "\u{1f}do.b", "\u{1f}do.c"]
    );
    let admit = (0..3).map(|step| Event::Admit { step: id(step) }).collect();
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
    assert!(plan.hold_groups.is_empty(), "they are in their hold groups already");
}

#[test]
fn where_there_is_room_for_one_the_urgent_one_is_sent() {
    let mut world = World::new(with(template("a b"), "b", |step| step.priority = 1));
    let plan = world.settle(vec![Event::Start], &mut room_for(1, &["do.a", "do.b"], false));
    assert_eq!(plan.sends.iter().map(|send| send.step).collect::<Vec<_>>(), [world.step("b").uuid]);
    assert_eq!(world.step("a").held_by, Some(HeldBy::Room));
}

#[test]
fn a_retry_takes_its_turn_under_the_limit_and_a_lost_attempt_keeps_its_place() {
    let mut world = World::started(template("a b"));
    let failed = world.run_step("a", failure("Flaky"));
    world.results.clear();
    world.settle(vec![failed], &mut under_limit(0));
    world.pass(Duration::from_secs(2));
    check(&mut world, vec![Event::RetryDue { step: id(0) }], under_limit(5), "hold a: limit");
    check(&mut world, vec![Event::Admit { step: id(0) }], under_limit(0), "hold a: limit");
    world.claim_step("b");
    world.pass(LEASE);
    let plan = world.settle(vec![Event::LeaseDue { step: id(1) }], &mut under_limit(0));
    assert_eq!(plan.sends.iter().map(|send| send.attempt).collect::<Vec<_>>(), [2]);
    let plan = world.settle(vec![Event::Admit { step: id(0) }], &mut under_limit(1));
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
    assert_eq!(definition.hold_group(0, &json!({"total": 7})).unwrap(), "t7\u{1f}do.a\u{1f}shop/order.a/7");
    for input in [json!({"total": null}), json!({"total": []}), json!({"total": ""}), json!({"total": "x".repeat(201)})]
    {
        definition.limits(0, &input).expect_err("no key");
    }
    let mut world = World::new(keyed("${input.nobody}"));
    let plan = world.settle(vec![Event::Start], &mut under_limit(9));
    assert_eq!((plan.task.state, world.step("a").state), (TaskState::Error, StepState::Error));
    assert!(plan.task.reason.as_ref().unwrap().contains("concurrency.key: "), "{:?}", plan.task.reason);
}
