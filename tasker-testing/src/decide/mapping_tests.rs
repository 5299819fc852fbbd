//! Maps, told one by one; the random suite mixes them with everything else.

use serde_json::{Value, json};

use crate::simulation::{World, failure, operator, permanent, success, template, with, with_input, with_map};
use tasker_shared::state_machine::decide::{ByHand, Event};
use tasker_shared::state_machine::definition::{Definition, OnItemFailure};
use tasker_shared::state_machine::plan::{Outcome, Room};
use tasker_shared::state_machine::retry::OnExhausted;
use tasker_shared::state_machine::states::{StepState, TaskState};

fn list(items: &Value) -> Outcome {
    Outcome::Success(json!({ "list": items }))
}

/// `list`, a map over what it answers, and a step that reads what the map came to.
fn mapped(max_parallel: u32, on_item_failure: OnItemFailure) -> Definition {
    let definition = template("list each<list sum<each");
    with_map(definition, "each", "${steps.list.output.list}", max_parallel, on_item_failure)
}

/// The states of the items, in order.
fn items(world: &World) -> Vec<&'static str> {
    let mut items: Vec<_> = world.steps.iter().filter(|step| step.item.is_some()).collect();
    items.sort_by_key(|step| step.item);
    items.iter().map(|step| step.state.as_str()).collect()
}

fn retry(world: &mut World) {
    let retry = World::retry_event();
    world.settle(vec![retry], &mut Room::unlimited());
}

#[test]
fn outputs_come_in_the_order_of_the_list_and_never_more_than_max_parallel_are_open() {
    let mut world = World::started(mapped(2, OnItemFailure::Fail));
    world.finish_step("list", list(&json!(["a", "b", "c"])));
    assert_eq!(items(&world), ["enqueued", "enqueued"]);
    world.finish_item("each", 1, Outcome::Success(json!("B")));
    assert_eq!(items(&world), ["enqueued", "complete", "enqueued"]);
    world.finish_item("each", 2, Outcome::Success(json!("C")));
    world.finish_item("each", 0, Outcome::Success(json!("A")));
    assert_eq!(world.output_of(world.step("each")), Some(&json!(["A", "B", "C"])));
    world.finish_step("sum", success());
    assert_eq!(world.task.state, TaskState::Complete);
}

#[test]
fn what_is_no_list_is_not_passed_over_and_a_retry_does_not_pass_over_it_either() {
    let definition = with(mapped(2, OnItemFailure::Fail), "each", |each| {
        each.retry.on_exhausted = OnExhausted::Continue;
    });
    let mut world = World::started(Definition { block_on_failure: true, ..definition });
    world.finish_step("list", list(&json!("none")));
    assert_eq!((world.task.state, world.step("sum").state), (TaskState::BlockedByFailures, StepState::Pending));
    retry(&mut world);
    assert_eq!((world.task.state, world.step("sum").state), (TaskState::BlockedByFailures, StepState::Pending));
    let (step, output) = ("each".into(), Some(json!([1])));
    let by_hand = Event::ByHand { operator: operator("olga"), step, act: ByHand::Complete, output };
    world.settle(vec![by_hand], &mut Room::unlimited());
    assert_eq!(world.step("sum").state, StepState::Enqueued, "who settles it by hand lets the others go on");
}

#[test]
fn items_that_fail_before_they_are_sent_have_their_places_in_the_output() {
    let definition = with_input(mapped(5, OnItemFailure::Continue), "each", &json!({"url": "${item.url}"}));
    let definition = with_map(definition, "each", "${steps.list.output.list}", 5, OnItemFailure::Continue);
    let mut world = World::started(definition);
    world.finish_step("list", list(&json!([{"no": 1}, {"no": 2}])));
    assert_eq!(items(&world), ["error", "error"]);
    assert_eq!(world.output_of(world.step("each")), Some(&json!([null, null])));
}

#[test]
fn an_item_whose_message_is_quarantined_has_null_in_the_output() {
    let mut world = World::started(mapped(5, OnItemFailure::Continue));
    world.finish_step("list", list(&json!([1, 2])));
    world.finish_item("each", 0, success());
    let event = world.run_item("each", 1, success());
    let Event::Result { step, attempt } = event else { unreachable!() };
    world.settle(vec![Event::Quarantined { step, attempt, reason: "torn".into() }], &mut Room::unlimited());
    assert_eq!(world.output_of(world.step("each")), Some(&json!([{"n": 1}, null])));
}

#[test]
fn an_item_that_never_had_an_input_is_not_sent_without_one_when_it_is_retried() {
    let definition = with_input(template("each"), "each", &json!({"url": "${item.url}"}));
    let definition = with_map(definition, "each", "${input.items}", 5, OnItemFailure::Fail);
    let mut world = World::new(Definition { block_on_failure: true, ..definition });
    world.task.input = json!({"items": [{"url": "x"}, {"no": 2}]});
    world.settle(vec![Event::Start], &mut Room::unlimited());
    world.finish_item("each", 0, success());
    assert_eq!((items(&world), world.task.state), (vec!["complete", "error"], TaskState::BlockedByFailures));
    let sent = world.messages.len();
    retry(&mut world);
    assert_eq!((items(&world), world.messages.len()), (vec!["complete", "error"], sent));
    let reason = world.task.reason.clone().unwrap_or_default();
    assert!(reason.contains("${item.url}"), "the reason is told again: {reason}");
}

#[test]
fn no_item_is_created_by_the_settle_that_ends_its_task() {
    let mut world = World::started(with_map(template("each other"), "each", "${input.items}", 1, OnItemFailure::Fail));
    assert_eq!(world.task.state, TaskState::Error, "there are no items in the input");
    world = World::new(with_map(template("each other"), "each", "${input.items}", 1, OnItemFailure::Fail));
    world.task.input = json!({"items": [1, 2]});
    world.settle(vec![Event::Start], &mut Room::unlimited());
    let (item, other) = (world.run_item("each", 0, success()), world.run_step("other", permanent("Broken")));
    world.settle(vec![item, other], &mut Room::unlimited());
    assert_eq!((world.task.state, items(&world)), (TaskState::Error, vec!["complete"]));
    retry(&mut world);
    assert_eq!(items(&world), ["complete", "enqueued"]);
    let item = world.steps.iter().find(|step| step.item == Some(1)).and_then(|step| step.input.clone());
    assert_eq!(item, Some(json!({"item": 2, "item_index": 1})));
}

#[test]
fn a_map_that_is_run_again_waits_for_what_it_depends_on_and_reads_its_list_anew() {
    let mut world = World::started(mapped(2, OnItemFailure::Fail));
    world.finish_step("list", list(&json!(["a", "b", "c"])));
    for item in 0..3 {
        world.finish_item("each", item, success());
    }
    world.finish_step("sum", success());
    let rerun = Event::Rerun { operator: operator("ruth"), from: vec!["list".into()] };
    world.settle(vec![rerun], &mut Room::unlimited());
    assert_eq!(world.step("each").state, StepState::Pending);
    assert_eq!(items(&world), ["complete"; 3], "no item runs before the list is there");
    world.finish_step("list", list(&json!(["d", "e"])));
    assert_eq!(items(&world), ["enqueued", "enqueued", "complete"], "the list is shorter now");
    let first = world.steps.iter().find(|step| step.item == Some(0)).expect("it is there");
    assert_eq!((first.attempt, &first.input), (2, &Some(json!({"item": "d", "item_index": 0}))));
    world.finish_item("each", 0, Outcome::Success(json!("D")));
    world.finish_item("each", 1, Outcome::Success(json!("E")));
    assert_eq!(world.output_of(world.step("each")), Some(&json!(["D", "E"])));
    world.finish_step("sum", success());
    assert_eq!(world.task.state, TaskState::Complete);
    // What is left of the longer list is nobody's any more, whatever is retried.
    let rerun = Event::Rerun { operator: operator("ruth"), from: vec!["each".into()] };
    world.settle(vec![rerun], &mut Room::unlimited());
    world.finish_item("each", 0, permanent("Broken"));
    retry(&mut world);
    assert_eq!(items(&world), ["enqueued", "enqueued", "complete"]);
}

#[test]
fn a_retry_keeps_the_items_that_are_done() {
    let mut world = World::started(mapped(2, OnItemFailure::Fail));
    world.finish_step("list", list(&json!([1, 2, 3])));
    world.finish_item("each", 0, success());
    world.finish_item("each", 1, permanent("Broken"));
    assert_eq!((world.task.state, items(&world)), (TaskState::Error, vec!["complete", "error", "cancelled"]));
    retry(&mut world);
    assert_eq!(items(&world), ["complete", "enqueued", "enqueued"]);
    world.finish_item("each", 2, success());
    world.finish_item("each", 1, failure("Flaky"));
    assert_eq!(world.task.state, TaskState::WaitingForRetry);
}
