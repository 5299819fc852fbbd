//! The document and the code say the same, in both directions.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::str::FromStr;

use super::super::plan::HeldBy;
use super::super::retry::OnExhausted;
use super::*;

const DOCUMENT: &str = include_str!("../../../../docs/reference/lifecycle.md");

/// The rows of the table below a heading, without its head.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = DOCUMENT.split_once(&format!("## {heading}\n")).expect(heading);
    let rows = section.lines().take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with('|'));
    let rows: Vec<Vec<&str>> =
        rows.skip(2).map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect();
    assert!(!rows.is_empty(), "no table below {heading:?}");
    rows
}

fn word<T: FromStr<Err: Debug>>(cell: &str) -> T {
    let word = cell.strip_prefix('`').and_then(|cell| cell.strip_suffix('`'));
    word.unwrap_or_else(|| panic!("{cell:?} is not in backticks")).parse().unwrap()
}

type Triples<S, E> = BTreeSet<(S, E, S)>;

/// Tables of moves, with the words for many states written out.
fn moves<S, E>(headings: [&str; 2], many: impl Fn(&str) -> Option<Vec<S>>) -> Triples<S, E>
where
    S: Copy + Ord + FromStr<Err: Debug>,
    E: Copy + Ord + FromStr<Err: Debug>,
{
    let states = |cell: &str| -> Vec<S> {
        cell.split(", ").flat_map(|part| many(part).unwrap_or_else(|| vec![word(part)])).collect()
    };
    let mut found = BTreeSet::new();
    for row in headings.into_iter().flat_map(table) {
        for from in states(row[0]) {
            found.extend(states(row[2]).into_iter().map(|to| (from, word(row[1]), to)));
        }
    }
    found
}

/// Every move that the code allows.
fn legal<S: Copy + Ord, E: Copy + Ord>(states: &[S], events: &[E], is_legal: fn(S, E, S) -> bool) -> Triples<S, E> {
    let mut all = BTreeSet::new();
    for from in states {
        for event in events {
            all.extend(states.iter().filter(|to| is_legal(*from, *event, **to)).map(|to| (*from, *event, *to)));
        }
    }
    all
}

fn same<T: Ord + Debug>(document: &BTreeSet<T>, code: &BTreeSet<T>) {
    let only_document: Vec<&T> = document.difference(code).collect();
    let only_code: Vec<&T> = code.difference(document).collect();
    assert!(only_document.is_empty() && only_code.is_empty(), "document: {only_document:?}, code: {only_code:?}");
}

fn only<S: Copy>(states: &[S], wanted: impl Fn(S) -> bool) -> Vec<S> {
    states.iter().copied().filter(|state| wanted(*state)).collect()
}

#[test]
fn the_document_lists_the_moves_of_a_task() {
    let many = |words: &str| {
        Some(match words {
            "any waiting" => {
                vec![TaskState::WaitingForRetry, TaskState::WaitingForDependencies, TaskState::BlockedByFailures]
            }
            "any terminal" => only(TaskState::ALL, TaskState::is_terminal),
            "any open" => only(TaskState::ALL, |state| !state.is_terminal()),
            "any open but suspended" => {
                only(TaskState::ALL, |state| !state.is_terminal() && state != TaskState::Suspended)
            }
            "any resting" => only(TaskState::ALL, |state| {
                !state.is_terminal() && !state.is_passing() && state != TaskState::Suspended
            }),
            _ => return None,
        })
    };
    let found = moves(["Moves of a task", "Moves of a task from many states"], many);
    same(&found, &legal(TaskState::ALL, TaskEvent::ALL, task_move_is_legal));
    let table: Vec<TaskMove> =
        table("Moves of a task").iter().map(|row| (word(row[0]), word(row[1]), word(row[2]))).collect();
    assert_eq!(table, TASK_MOVES);
    let events: BTreeSet<TaskEvent> = found.iter().map(|(_, event, _)| *event).collect();
    assert_eq!(events.len(), TaskEvent::ALL.len(), "an event moves nothing");
}

#[test]
fn the_document_lists_the_moves_of_a_step() {
    let many = |words: &str| {
        Some(match words {
            "any terminal" => only(StepState::ALL, StepState::is_terminal),
            "any open" => only(StepState::ALL, |state| !state.is_terminal()),
            _ => return None,
        })
    };
    let found = moves(["Moves of a step", "Moves of a step from many states"], many);
    same(&found, &legal(StepState::ALL, StepEvent::ALL, step_move_is_legal));
    let table: Vec<StepMove> =
        table("Moves of a step").iter().map(|row| (word(row[0]), word(row[1]), word(row[2]))).collect();
    assert_eq!(table, STEP_MOVES);
    let events: BTreeSet<StepEvent> = found.iter().map(|(_, event, _)| *event).collect();
    assert_eq!(events.len(), StepEvent::ALL.len(), "an event moves nothing");
}

#[test]
fn the_document_lists_every_state_of_a_task_with_its_public_status() {
    let found: Vec<(TaskState, &str, &str)> =
        table("States of a task").iter().map(|row| (word(row[0]), row[1], row[2])).collect();
    let known: Vec<(TaskState, &str, &str)> = TaskState::ALL
        .iter()
        .map(|state| {
            let rests = match state {
                state if state.is_terminal() => "final",
                state if state.is_passing() => "no",
                _ => "yes",
            };
            (*state, state.public_status(), rests)
        })
        .collect();
    assert_eq!(found, known);
}

#[test]
fn the_document_lists_every_state_of_a_step() {
    let found: Vec<(StepState, &str)> = table("States of a step").iter().map(|row| (word(row[0]), row[1])).collect();
    let kind = |state: StepState| match state {
        _ if state.is_terminal() => "terminal",
        _ if state.is_in_flight() => "in flight",
        _ => "open",
    };
    let known: Vec<(StepState, &str)> = StepState::ALL.iter().map(|state| (*state, kind(*state))).collect();
    assert_eq!(found, known);
}

#[test]
fn the_document_lists_every_reason_to_hold_a_step() {
    let found: Vec<HeldBy> = table("Steps that are ready and not sent").iter().map(|row| word(row[0])).collect();
    // A new reason does not compile here, and then belongs in the document too.
    let known = [HeldBy::Room, HeldBy::Worker, HeldBy::Limit, HeldBy::Paused].map(|held| match held {
        HeldBy::Room | HeldBy::Worker | HeldBy::Limit | HeldBy::Paused => held,
    });
    assert_eq!(found, known);
}

#[test]
fn the_document_lists_every_policy() {
    let rows = table("What a failed step means for its task");
    let found: Vec<OnExhausted> = rows
        .iter()
        .map(|row| {
            let word = row[0].trim_end_matches(" (default)").trim_matches('`');
            serde_json::from_value(word.into()).unwrap()
        })
        .collect();
    let known = [OnExhausted::Fail, OnExhausted::Block, OnExhausted::Continue].map(|policy| match policy {
        OnExhausted::Fail | OnExhausted::Block | OnExhausted::Continue => policy,
    });
    assert_eq!(found, known);
    assert!(rows[0][0].ends_with("(default)") && OnExhausted::default() == OnExhausted::Fail);
    let lost = format!("`max_lost` ({})", super::super::decide::MAX_LOST);
    assert!(DOCUMENT.contains(&lost), "the document says how often an attempt may be lost");
}

#[test]
fn every_word_is_read_back_as_what_it_names() {
    for state in TaskState::ALL {
        assert_eq!(state.as_str().parse(), Ok(*state));
    }
    for state in StepState::ALL {
        assert_eq!(state.as_str().parse(), Ok(*state));
    }
    let error = "Complete".parse::<StepState>().unwrap_err();
    assert_eq!(error.to_string(), "\"Complete\" is not a StepState");
}
