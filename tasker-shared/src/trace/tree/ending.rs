//! What a move says of an attempt, or of a generation of a task: that it began, that it ended, and how. Each
//! function matches every event or state, so that one that is added does not compile until it is said here.

use chrono::{DateTime, Utc};

use crate::state_machine::states::{StepEvent, StepState, TaskEvent, TaskState};
use crate::state_machine::wait::CHILD;
use crate::trace::log::{Attempt, Transition};

/// How an attempt ended.
pub(super) struct Ending {
    pub outcome: &'static str,
    /// Class and words; an attempt that will be retried is an error too.
    pub error: Option<(String, String)>,
    pub last_heartbeat_at: Option<DateTime<Utc>>,
}

impl Ending {
    /// `None`: it is no move of a step.
    pub fn of(closing: &Transition, attempt: Option<&Attempt>) -> Option<Self> {
        let (_, event, to) = closing.of_step()?;
        let failure = attempt.and_then(|attempt| attempt.failure.as_ref());
        let detail = closing.detail.as_ref();
        let kind = || detail.and_then(|d| d.error_type.clone());
        let reason = || detail.and_then(|d| d.reason.clone());
        let error = match event {
            StepEvent::Complete | StepEvent::CompleteManually | StepEvent::Skip => None,
            StepEvent::ChildFinished if to == StepState::Complete => None,
            StepEvent::LeaseExpired => {
                Some(("lease_expired".to_owned(), "the worker was silent for its whole lease".to_owned()))
            }
            StepEvent::Cancel => {
                Some(("cancelled".to_owned(), reason().unwrap_or_else(|| "the task ended".to_owned())))
            }
            StepEvent::RunTimeout | StepEvent::QueueTimeout | StepEvent::TotalTimeout => Some((
                kind().unwrap_or_else(|| "timeout".to_owned()),
                reason().unwrap_or_else(|| "it took too long".to_owned()),
            )),
            StepEvent::ChildFinished
            | StepEvent::Enqueue
            | StepEvent::Claim
            | StepEvent::Report
            | StepEvent::ScheduleRetry
            | StepEvent::RetryReady
            | StepEvent::Fail
            | StepEvent::BeginWait
            | StepEvent::TimerFired
            | StepEvent::SignalReceived
            | StepEvent::ItemsDone
            | StepEvent::ResolveManually
            | StepEvent::OperatorRetry
            | StepEvent::Rerun => Some(failure.map_or_else(
                || (kind().unwrap_or_else(|| "error".to_owned()), reason().unwrap_or_default()),
                |failure| (failure.kind.clone(), failure.message.clone()),
            )),
        };
        Some(Self {
            outcome: outcome(event, to, failure.map(|failure| &*failure.kind)),
            error,
            last_heartbeat_at: detail.and_then(|d| d.last_heartbeat_at),
        })
    }
}

/// How a generation of a task ended, in one word, and whether that is an error; `None`: this move ends none.
pub(super) fn task_outcome(event: TaskEvent, to: TaskState) -> Option<(&'static str, bool)> {
    match to {
        TaskState::Error if event == TaskEvent::TotalTimeout => Some(("timeout", true)),
        TaskState::Error => Some(("failure", true)),
        TaskState::Cancelled => Some(("cancellation", false)),
        TaskState::Complete | TaskState::ResolvedManually => Some(("success", false)),
        TaskState::Pending
        | TaskState::Initializing
        | TaskState::EnqueuingSteps
        | TaskState::StepsInProcess
        | TaskState::EvaluatingResults
        | TaskState::WaitingForDependencies
        | TaskState::WaitingForRetry
        | TaskState::BlockedByFailures
        | TaskState::Suspended => None,
    }
}

/// How an attempt ended, in one word, by the move that closed it and the class of its failure. One
/// that failed and is tried again is an `error`, one that ends its step a `failure`.
pub fn outcome(event: StepEvent, to: StepState, failure: Option<&str>) -> &'static str {
    match event {
        StepEvent::Complete | StepEvent::CompleteManually => "success",
        StepEvent::ChildFinished if to == StepState::Complete => "success",
        StepEvent::Skip => "skip",
        StepEvent::LeaseExpired => "lost",
        StepEvent::Cancel => "cancellation",
        StepEvent::RunTimeout | StepEvent::QueueTimeout | StepEvent::TotalTimeout => "timeout",
        StepEvent::ChildFinished
        | StepEvent::Enqueue
        | StepEvent::Claim
        | StepEvent::Report
        | StepEvent::ScheduleRetry
        | StepEvent::RetryReady
        | StepEvent::Fail
        | StepEvent::BeginWait
        | StepEvent::TimerFired
        | StepEvent::SignalReceived
        | StepEvent::ItemsDone
        | StepEvent::ResolveManually
        | StepEvent::OperatorRetry
        | StepEvent::Rerun => match failure {
            Some("timeout") => "timeout",
            _ if to == StepState::WaitingForRetry => "error",
            _ => "failure",
        },
    }
}

/// The attempt that a move opens.
pub(super) fn opens(row: &Transition) -> Option<i32> {
    let (_, event, to) = row.of_step()?;
    let waits_for_child = || row.detail.as_ref().is_some_and(|detail| detail.waiting.as_deref() == Some(CHILD));
    let opens = to == StepState::Enqueued || (to == StepState::Waiting && waits_for_child());
    let attempt = row.attempt.filter(|_| opens)?;
    Some(if event == StepEvent::LeaseExpired { attempt + 1 } else { attempt })
}

/// Whether a move ends the attempt that was open before it.
pub fn closes(event: StepEvent, to: StepState) -> bool {
    event == StepEvent::LeaseExpired || (!to.is_in_flight() && to != StepState::Pending)
}

/// Whether this event made the move.
pub(super) fn is(row: &Transition, event: StepEvent) -> bool {
    matches!(row.of_step(), Some((_, made, _)) if made == event)
}
