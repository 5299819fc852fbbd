//! The history of an open attempt before the move that closes it, made from the rows of its step and
//! of itself, so that a settle need not read the log.

use chrono::{DateTime, Utc};

use super::plan::{Detail, Move, Step};
use super::states::{Change, StepEvent, StepState};
use super::wait::CHILD;

/// Who claimed an attempt, and when it was claimed and reported.
#[derive(Debug, Clone, Copy)]
pub struct Claimed<'a> {
    /// Who claimed it.
    pub worker: &'a str,
    /// When the claim's transaction began to write.
    pub began_at: DateTime<Utc>,
    /// When it was claimed.
    pub at: DateTime<Utc>,
    /// The same two times of its report, once it was made.
    pub reported: Option<(DateTime<Utc>, DateTime<Utc>)>,
}

/// A row of the log: its move, `began_at` and `at`.
pub type Timed = (Move, DateTime<Utc>, DateTime<Utc>);

/// The Enqueue, Claim and Report of an attempt, as far as it came, or the move that began its wait for a
/// task; as the log has them, but for the claim's token. Nothing of a step that has no attempt.
pub fn attempt_history(step: &Step, claimed: Option<Claimed<'_>>) -> Vec<Timed> {
    let (Some(version), Some(began_at), Some(at)) = (step.enqueued_version, step.enqueued_began_at, step.enqueued_at)
    else {
        return Vec::new();
    };
    let event = step.enqueued_event.unwrap_or(StepEvent::Enqueue);
    let lost = event == StepEvent::LeaseExpired;
    let move_of = |version, from, event, to| Move {
        entity: step.uuid,
        version,
        task_version: None,
        generation: step.generation,
        attempt: Some(step.attempt),
        change: Change::Step((from, event, to)),
        actor: None,
        claim_token: None,
        detail: None,
    };
    if event == StepEvent::BeginWait {
        // A step that has failed before in its generation comes from its retry.
        let from = if step.failures > 0 { StepState::WaitingForRetry } else { StepState::Pending };
        let detail = Some(Detail { waiting: Some(CHILD.to_owned()), ..Detail::default() });
        return vec![(Move { detail, ..move_of(version, from, event, StepState::Waiting) }, began_at, at)];
    }
    let from = match event {
        StepEvent::RetryReady => StepState::WaitingForRetry,
        StepEvent::LeaseExpired => StepState::InProgress,
        _ => StepState::Pending,
    };
    let opening = Move {
        task_version: step.enqueued_task_version,
        // The row of a lost attempt that began this one belongs to the lost attempt.
        attempt: Some(if lost { step.attempt - 1 } else { step.attempt }),
        ..move_of(version, from, event, StepState::Enqueued)
    };
    let mut moves = vec![(opening, began_at, at)];
    if let Some(claimed) = claimed {
        let actor = || Some(claimed.worker.to_owned());
        let claim = move_of(version + 1, StepState::Enqueued, StepEvent::Claim, StepState::InProgress);
        moves.push((Move { actor: actor(), ..claim }, claimed.began_at, claimed.at));
        if let Some((began_at, at)) = claimed.reported {
            let report = move_of(version + 2, StepState::InProgress, StepEvent::Report, step.state);
            moves.push((Move { actor: actor(), ..report }, began_at, at));
        }
    }
    moves
}
