//! The tree is complete, honest and the same from either source: properties over the logs of
//! random stories, and a few trees to look at.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use crate::decide::properties::{Driver, Story, story};
use crate::harness::{log, transition};
use crate::simulation::{LEASE, Settled, World, failure, id, operator, permanent, success, template, with};
use tasker_shared::state_machine::decide::Event;
use tasker_shared::state_machine::plan::Room;
use tasker_shared::state_machine::states::TaskState;
use tasker_shared::trace::ids::SpanKey;
use tasker_shared::trace::ids::span_id;
use tasker_shared::trace::log::{Head, TaskLog, Transition};
use tasker_shared::trace::names;
use tasker_shared::trace::span::{Span, SpanId, TaskSpans, Value};
use tasker_shared::trace::tree::{MAX_LINKS, in_parts, root_id, spans, spans_so_far};

fn head(world: &World) -> Head {
    Head {
        task_uuid: world.task.uuid,
        namespace: world.definition.namespace.clone(),
        task_name: world.definition.name.clone(),
        template_version: world.definition.version.clone(),
        correlation_id: "order-4711".into(),
        parent_correlation_id: None,
        parent_task_uuid: None,
        priority: world.task.priority,
        generation: world.task.generation,
        generation_began_at: world.generation_began_at,
        created_at: world.created_at,
        trace_id: [7; 16],
        root_link: None,
        remote_span_id: Some([9; 8]),
        trace_flags: 1,
        tracestate: None,
    }
}

/// The whole log, as recovery reads it.
fn full(world: &World) -> TaskLog {
    log(world, head(world))
}

/// What an orchestrator hands to the exporter after this settle, out of its memory.
fn slice(world: &World, settled: &Settled) -> TaskLog {
    let all = full(world);
    let moves = world.log[settled.rows.clone()].iter().chain(&settled.rebuilt);
    let attempts = all.attempts.iter().filter(|row| settled.closed.contains(&(row.step, row.attempt)));
    TaskLog {
        head: Head {
            generation: settled.generation,
            generation_began_at: settled.generation_began_at,
            ..all.head.clone()
        },
        transitions: moves.map(transition).collect(),
        attempts: attempts.cloned().collect(),
        steps: all.steps,
    }
}

fn sorted(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_by_key(|span| span.id);
    spans
}

/// The spans of every settle are the same from memory and from the log, and together they are all.
fn slices_agree(world: &World) -> TestCaseResult {
    let all = spans(&full(world)).spans;
    let mut exported = Vec::new();
    for settled in &world.settled {
        let live: Vec<Span> =
            spans(&slice(world, settled)).spans.into_iter().filter(|span| span.settled_at == settled.at).collect();
        let recovered: Vec<Span> = all.iter().filter(|span| span.settled_at == settled.at).cloned().collect();
        let (live, recovered) = (sorted(live), sorted(recovered));
        for (live, recovered) in live.iter().zip(&recovered) {
            prop_assert_eq!(live, recovered);
        }
        prop_assert_eq!(live.len(), recovered.len());
        exported.extend(live);
    }
    prop_assert_eq!(sorted(exported), sorted(all));
    Ok(())
}

fn tree_is_sound(log: &TaskLog, all: &TaskSpans) -> TestCaseResult {
    let by_id: HashMap<SpanId, &Span> = all.spans.iter().map(|span| (span.id, span)).collect();
    prop_assert_eq!(by_id.len(), all.spans.len(), "span ids are unique");
    let ended: BTreeSet<i32> = log
        .transitions
        .iter()
        .filter(|row| row.of_task().is_some_and(|(.., to)| to.is_terminal()))
        .map(|row| row.generation)
        .collect();
    let mut seen = BTreeSet::new();
    for span in &all.spans {
        prop_assert!(span.start <= span.end, "{:?}", span);
        seen.insert(span.id);
        let Some(parent) = span.parent.filter(|_| !span.parent_is_remote) else {
            prop_assert_eq!(span.name, names::TASK_ORCHESTRATION);
            continue;
        };
        let Some(parent) = by_id.get(&parent) else {
            let open = root_id(&log.head, log.head.generation);
            prop_assert!(parent == open && !ended.contains(&log.head.generation), "{:?} has no parent", span);
            continue;
        };
        prop_assert!(seen.contains(&parent.id), "{:?} stands before its parent", span);
        prop_assert!(parent.start <= span.start && span.end <= parent.end, "{:?} leaves {:?}", span, parent);
    }
    let roots: Vec<SpanId> =
        all.spans.iter().filter(|span| span.name == names::TASK_ORCHESTRATION).map(|span| span.id).collect();
    let wanted: BTreeSet<SpanId> = ended.iter().map(|generation| root_id(&log.head, *generation)).collect();
    prop_assert_eq!(roots.len(), wanted.len());
    prop_assert_eq!(roots.into_iter().collect::<BTreeSet<_>>(), wanted, "one root for each ended generation");
    for span in &all.spans {
        for link in &span.links {
            prop_assert!(by_id.contains_key(&link.span_id), "{:?} links to nothing", span);
        }
        if span.name == names::RESULT_EVALUATION {
            prop_assert!(span.links.len() <= MAX_LINKS);
        }
    }
    attempts_are_sound(log, all)
}

fn waits_for_child(row: &Transition) -> bool {
    row.detail.as_ref().is_some_and(|detail| detail.waiting.as_deref() == Some("child"))
}

/// Every attempt 1..n has one step.execution, linked to the one before it.
fn attempts_are_sound(log: &TaskLog, all: &TaskSpans) -> TestCaseResult {
    let execution = |step, attempt: i32| {
        span_id(&log.head.trace_id, step, 0, u64::from(attempt.unsigned_abs()), SpanKey::StepExecution, 0)
    };
    for step in log.steps.keys() {
        let opens = |row: &&Transition| row.entity == *step && (row.change.to() == "enqueued" || waits_for_child(row));
        let opened = log.transitions.iter().filter(opens).count();
        for attempt in 1..=i32::try_from(opened).unwrap() {
            let found: Vec<&Span> = all.spans.iter().filter(|span| span.id == execution(*step, attempt)).collect();
            prop_assert_eq!(found.len(), 1, "attempt {} of {}", attempt, step);
            let links_back = found[0].links.iter().any(|link| link.span_id == execution(*step, attempt - 1));
            prop_assert_eq!(links_back, attempt > 1);
        }
    }
    Ok(())
}

/// What the rows of a log whose attempts are all closed must become, counted without the tree.
fn counted(log: &TaskLog) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    let mut add = |name, n| *counts.entry(name).or_default() += n;
    for row in &log.transitions {
        if row.entity == log.head.task_uuid {
            add(names::TASK_STATE_TRANSITION, 1);
            match (row.change.from(), row.change.to()) {
                (_, "complete" | "error" | "cancelled" | "resolved_manually") => {
                    add(names::TASK_ORCHESTRATION, 1);
                }
                ("initializing" | "evaluating_results", "enqueuing_steps") => {
                    add(names::STEP_DISCOVERY, 1);
                }
                ("enqueuing_steps", "steps_in_process") => add(names::STEP_ENQUEUING, 1),
                ("steps_in_process", "evaluating_results") => add(names::RESULT_EVALUATION, 1),
                _ => {}
            }
            continue;
        }
        add(names::STEP_STATE_TRANSITION, 1);
        add(names::STEP_WAIT, row.detail.as_ref().map_or(0, |detail| detail.waits.len()));
        match row.change.event() {
            _ if row.change.to() == "enqueued" => {
                add(names::STEP_EXECUTION, 1);
                add(names::STEP_WAIT, 1);
            }
            _ if waits_for_child(row) => add(names::STEP_EXECUTION, 1),
            "Claim" => add(names::HANDLER_EXECUTION, 1),
            "Report" => add(names::RESULT_SUBMISSION, 1),
            _ => {}
        }
    }
    counts.retain(|_, count| *count > 0);
    counts
}

fn names_are_counted(log: &TaskLog, all: &TaskSpans) -> TestCaseResult {
    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    for span in &all.spans {
        *found.entry(span.name).or_default() += 1;
    }
    prop_assert_eq!(found, counted(log));
    Ok(())
}

/// A person may look at any moment, with a clock that is a little off.
fn every_prefix_can_be_drawn(log: &TaskLog) -> TestCaseResult {
    let last = log.transitions.last().map_or(log.head.created_at, |row| row.at);
    for length in 0..=log.transitions.len() {
        let prefix = TaskLog { transitions: log.transitions[..length].to_vec(), ..log.clone() };
        for now in [log.head.created_at - Duration::from_secs(5), last] {
            let drawn = spans_so_far(&prefix, now).spans;
            let ids: BTreeSet<SpanId> = drawn.iter().map(|span| span.id).collect();
            prop_assert_eq!(ids.len(), drawn.len());
        }
    }
    Ok(())
}

fn run(story: &Story, heal: bool) -> Result<World, TestCaseError> {
    let mut driver = Driver::new(story);
    driver.run()?;
    if heal && driver.world.task.state != TaskState::Complete {
        driver.heal()?;
    }
    Ok(driver.world)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_log_becomes_one_sound_tree(story in story(), heal: bool) {
        let world = run(&story, heal)?;
        let log = full(&world);
        let all = spans(&log);
        tree_is_sound(&log, &all)?;
        names_are_counted(&log, &all)?;
    }

    #[test]
    fn what_is_exported_live_is_what_recovery_exports(story in story(), heal: bool) {
        slices_agree(&run(&story, heal)?)?;
    }

    #[test]
    fn a_tree_can_be_drawn_at_any_moment(story in story()) {
        let mut story = story;
        story.shorten(6, 60);
        every_prefix_can_be_drawn(&full(&run(&story, false)?))?;
    }
}

#[test]
fn rows_in_any_order_give_the_same_spans() {
    let world = retried();
    let log = full(&world);
    let mut backwards = log.clone();
    backwards.transitions.reverse();
    assert_eq!(sorted(spans(&log).spans), sorted(spans(&backwards).spans));
}

#[test]
fn parts_of_any_size_are_the_same_spans_in_the_same_order() {
    let log = full(&retried());
    let whole = spans(&log);
    for size in [1, 3, 1000] {
        let parts: Vec<TaskSpans> = in_parts(&log, size).collect();
        assert!(parts.iter().all(|part| part.spans.len() <= size && part.common == whole.common));
        assert!(parts.iter().rev().skip(1).all(|part| part.spans.len() == size));
        assert_eq!(parts.into_iter().flat_map(|part| part.spans).collect::<Vec<_>>(), whole.spans);
    }
}

#[test]
fn links_beyond_the_limit_are_counted() {
    let names: Vec<String> = (0..MAX_LINKS + 2).map(|n| format!("s{n}")).collect();
    let mut world = World::started(template(&names.join(" ")));
    let events = names.iter().map(|name| world.run_step(name, success())).collect();
    world.settle(events, &mut Room::unlimited());
    let all = spans(&full(&world)).spans;
    let evaluated = all.iter().find(|span| span.name == names::RESULT_EVALUATION).unwrap();
    assert_eq!(evaluated.links.len(), MAX_LINKS);
    assert_eq!(evaluated.attributes, [(names::RESULTS, Value::Int(130)), (names::LINKS_OMITTED, Value::Int(2))]);
}

#[test]
fn a_result_that_was_cancelled_unseen_is_not_evaluated() {
    let mut world = World::started(template("a b"));
    world.run_step("a", success());
    let event = world.run_step("b", permanent("Broken"));
    world.settle(vec![event], &mut Room::unlimited());
    let all = spans(&full(&world)).spans;
    let evaluated = all.iter().find(|span| span.name == names::RESULT_EVALUATION).unwrap();
    assert_eq!(evaluated.attributes, [(names::RESULTS, Value::Int(1))]);
}

#[test]
fn a_repair_within_a_generation_does_not_move_its_beginning() {
    let mut definition = template("a");
    definition.block_on_failure = true;
    let mut world = World::started(definition);
    world.settle(vec![Event::Cancel(operator("carl"))], &mut Room::unlimited());
    let retry = World::retry_event();
    world.settle(vec![retry], &mut Room::unlimited());
    let began = world.generation_began_at;
    world.finish_step("a", permanent("Broken"));
    assert_eq!(world.task.state, TaskState::BlockedByFailures);
    // The repair and the end in one settle: its slice holds no row from the beginning.
    let (retry, cancel) = (World::retry_event(), Event::Cancel(operator("carl")));
    world.settle(vec![retry, cancel], &mut Room::unlimited());
    slices_agree(&world).unwrap();
    let root = root_id(&head(&world), 2);
    let spans = spans(&slice(&world, world.settled.last().unwrap())).spans;
    assert_eq!(spans.iter().find(|span| span.id == root).unwrap().start, began);
}

#[test]
fn an_attempt_that_nobody_claimed_says_which_time_ran_out() {
    let definition = with(template("a"), "a", |a| {
        a.queue_timeout = Some(Duration::from_mins(1));
    });
    let mut world = World::started(definition);
    world.pass(Duration::from_mins(1));
    let timeout = Event::QueueDue { step: id(0) };
    world.settle(vec![timeout], &mut Room::unlimited());
    let all = spans(&full(&world)).spans;
    let execution = all.iter().find(|span| span.name == names::STEP_EXECUTION).unwrap();
    let said = |key| execution.attributes.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone());
    assert_eq!(said(names::OUTCOME), Some("timeout".into()));
    assert_eq!(said(names::ERROR_TYPE), Some("queue_timeout".into()));
}

#[test]
fn a_row_whose_times_are_reversed_is_still_drawn() {
    let mut log = full(&retried());
    for row in &mut log.transitions {
        row.began_at = row.at + Duration::from_secs(1);
    }
    assert!(spans(&log).spans.iter().all(|span| span.start <= span.end));
}

// Trees to look at.

/// Indented names with the attributes that tell the story, and times since the task was created.
fn draw(world: &World) -> String {
    let all = spans(&full(world)).spans;
    let mut children: BTreeMap<Option<SpanId>, Vec<&Span>> = BTreeMap::new();
    for span in &all {
        children.entry(span.parent.filter(|_| !span.parent_is_remote)).or_default().push(span);
    }
    for siblings in children.values_mut() {
        siblings.sort_by_key(|span| (span.start, span.end));
    }
    let mut drawn = String::new();
    draw_below(world, &all, &children, None, 0, &mut drawn);
    drawn
}

fn draw_below(
    world: &World,
    all: &[Span],
    children: &BTreeMap<Option<SpanId>, Vec<&Span>>,
    parent: Option<SpanId>,
    depth: usize,
    drawn: &mut String,
) {
    const TOLD: [&str; 14] = [
        names::FROM_STATE,
        names::EVENT,
        names::TO_STATE,
        names::STEP_NAME,
        names::ATTEMPT_NUMBER,
        names::WAIT_REASON,
        names::READY_STEPS,
        names::RESULTS,
        names::MESSAGING_BATCH_COUNT,
        names::MESSAGING_DESTINATION,
        names::GENERATION,
        names::OUTCOME,
        names::ERROR_TYPE,
        names::ACTOR,
    ];
    for span in children.get(&parent).into_iter().flatten() {
        let ms = |at: DateTime<Utc>| (at - world.created_at).num_milliseconds();
        write!(drawn, "{:indent$}{} {}..{}", "", span.name, ms(span.start), ms(span.end), indent = depth * 2).unwrap();
        for key in TOLD {
            match span.attributes.iter().find(|(name, _)| *name == key) {
                Some((_, Value::Str(text))) => write!(drawn, " {text}").unwrap(),
                Some((_, Value::Int(n))) => write!(drawn, " {key}={n}").unwrap(),
                _ => {}
            }
        }
        let step = span.attributes.iter().find_map(|(name, value)| match value {
            Value::Str(uuid) if *name == names::STEP_UUID => {
                world.steps.iter().find(|step| step.uuid.to_string() == *uuid)
            }
            _ => None,
        });
        if let Some(step) = step.filter(|_| span.name != names::STEP_EXECUTION) {
            write!(drawn, " of {}", world.definition.steps[step.index as usize].name).unwrap();
        }
        for link in &span.links {
            let target = all.iter().find(|other| other.id == link.span_id).map_or("nothing", |other| other.name);
            write!(drawn, " ->{target}").unwrap();
        }
        if let Some(error) = &span.error {
            write!(drawn, " ERROR {error:?}").unwrap();
        }
        drawn.push('\n');
        draw_below(world, all, children, Some(span.id), depth + 1, drawn);
    }
}

#[test]
fn happy_diamond() {
    let mut world = World::started(template("a b<a c<a d<b,c"));
    world.finish_step("a", success());
    let b = world.run_step("b", success());
    let c = world.run_step("c", success());
    world.settle(vec![b, c], &mut Room::unlimited());
    world.finish_step("d", success());
    insta::assert_snapshot!(draw(&world));
}

fn retried() -> World {
    let mut world = World::started(template("a"));
    world.finish_step("a", failure("Flaky"));
    world.pass(Duration::from_secs(1));
    world.settle(vec![Event::RetryDue { step: id(0) }], &mut Room::unlimited());
    world.finish_step("a", success());
    world
}

#[test]
fn one_retry_then_success() {
    insta::assert_snapshot!(draw(&retried()));
}

#[test]
fn permanent_failure_cancels_the_siblings() {
    let mut world = World::started(template("a b c d<a,b"));
    world.claim_step("b");
    world.finish_step("a", permanent("CardDeclined"));
    insta::assert_snapshot!(draw(&world));
}

#[test]
fn lost_worker() {
    let mut world = World::started(template("a"));
    let claim = world.claim_step("a");
    world.pass(Duration::from_secs(3));
    world.heartbeat(claim);
    world.pass(LEASE);
    world.settle(vec![Event::LeaseDue { step: id(0) }], &mut Room::unlimited());
    world.finish_step("a", success());
    insta::assert_snapshot!(draw(&world));
}

#[test]
fn cancelled_while_it_runs_waits_and_is_held() {
    let mut world = World::started(template("a b c<b d<c"));
    world.finish_step("a", failure("Flaky"));
    let b = world.run_step("b", success());
    world.settle(vec![b], &mut Room::default());
    world.settle(vec![Event::Cancel(operator("carl"))], &mut Room::unlimited());
    insta::assert_snapshot!(draw(&world));
}
