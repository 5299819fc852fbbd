//! The moves of an open attempt before the one that closes it, out of the rows of its step and of
//! itself: so a settle need not read the log to tell of them.

use chrono::{DateTime, Utc};

use super::plan::{Detail, Move, Step};
use super::states::StepEvent;
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

/// Its Enqueue, its Claim and its Report, as far as it came, or the move that began its wait for a
/// task; as the log has them, but for the claim's token. Nothing of a step that has no attempt.
pub fn earlier_moves(step: &Step, claimed: Option<Claimed<'_>>) -> Vec<Timed> {
    let (Some(version), Some(began_at), Some(at)) = (step.enqueued_version, step.enqueued_began_at, step.enqueued_at)
    else {
        return Vec::new();
    };
    let event = step.enqueued_event.unwrap_or(StepEvent::Enqueue.as_str());
    let lost = event == StepEvent::LeaseExpired.as_str();
    let move_of = |version, from, to, event| Move {
        entity: step.uuid,
        version,
        task_version: None,
        generation: step.generation,
        attempt: Some(step.attempt),
        from,
        to,
        event,
        actor: None,
        claim_token: None,
        detail: None,
    };
    if event == StepEvent::BeginWait.as_str() {
        // A step that has failed before in its generation comes from its retry.
        let from = if step.failures > 0 { "waiting_for_retry" } else { "pending" };
        let detail = Some(Detail { waiting: Some(CHILD.to_owned()), ..Detail::default() });
        return vec![(Move { detail, ..move_of(version, from, "waiting", event) }, began_at, at)];
    }
    let from = match event {
        "RetryReady" => "waiting_for_retry",
        "LeaseExpired" => "in_progress",
        _ => "pending",
    };
    let opening = Move {
        task_version: step.enqueued_task_version,
        // The row of a lost attempt that began this one belongs to the lost attempt.
        attempt: Some(if lost { step.attempt - 1 } else { step.attempt }),
        ..move_of(version, from, "enqueued", event)
    };
    let mut moves = vec![(opening, began_at, at)];
    if let Some(claimed) = claimed {
        let actor = || Some(claimed.worker.to_owned());
        let claim = Move { actor: actor(), ..move_of(version + 1, "enqueued", "in_progress", "Claim") };
        moves.push((claim, claimed.began_at, claimed.at));
        if let Some((began_at, at)) = claimed.reported {
            let to = step.state.as_str();
            moves.push((Move { actor: actor(), ..move_of(version + 2, "in_progress", to, "Report") }, began_at, at));
        }
    }
    moves
}
