//! What the tree is built from: the committed rows of one task, or a part of them.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::span::{SpanId, TraceId};
use crate::state_machine::plan::{Detail, Failure, Move};
use crate::state_machine::states::{Change, StepMove, TaskMove};

/// The rows. A *slice* of the log holds the moves of one transaction and every move of the
/// attempts it closed; the spans that the transaction settled are the same from either.
#[derive(Debug, Clone)]
pub struct TaskLog {
    /// What the task's row says of its trace.
    pub head: Head,
    /// Rows of `tasker.transitions`, in any order.
    pub transitions: Vec<Transition>,
    /// Rows of `tasker.attempts`.
    pub attempts: Vec<Attempt>,
    /// What the template says of each step that occurs.
    pub steps: HashMap<Uuid, StepInfo>,
}

/// What every span of a task shares, and what its root says.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.tasks, explained there")]
pub struct Head {
    pub task_uuid: Uuid,
    pub namespace: Arc<str>,
    pub task_name: Arc<str>,
    pub template_version: Arc<str>,
    pub correlation_id: String,
    pub parent_correlation_id: Option<String>,
    pub parent_task_uuid: Option<Uuid>,
    pub priority: i32,
    pub generation: i32,
    pub generation_began_at: DateTime<Utc>,
    pub created_at: DateTime<Utc>,
    pub trace_id: TraceId,
    pub remote_span_id: Option<SpanId>,
    pub root_link: Option<String>,
    pub trace_flags: u8,
    pub tracestate: Option<String>,
}

/// One row of the log.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.transitions, explained there")]
pub struct Transition {
    pub entity: Uuid,
    pub version: i32,
    pub task_version: Option<i32>,
    pub generation: i32,
    pub attempt: Option<i32>,
    pub change: Change,
    pub actor: Option<String>,
    pub began_at: DateTime<Utc>,
    pub at: DateTime<Utc>,
    pub detail: Option<Detail>,
}

impl Transition {
    /// The row of a move that was made in a transaction.
    pub fn of(made: Move, began_at: DateTime<Utc>, at: DateTime<Utc>) -> Self {
        Self {
            entity: made.entity,
            version: made.version,
            task_version: made.task_version,
            generation: made.generation,
            attempt: made.attempt,
            change: made.change,
            actor: made.actor,
            began_at,
            at,
            detail: made.detail,
        }
    }
}

impl Transition {
    /// Its move, if it is the task's.
    pub fn of_task(&self) -> Option<TaskMove> {
        match self.change {
            Change::Task(made) => Some(made),
            Change::Step(_) => None,
        }
    }

    /// Its move, if it is a step's.
    pub fn of_step(&self) -> Option<StepMove> {
        match self.change {
            Change::Step(made) => Some(made),
            Change::Task(_) => None,
        }
    }
}

/// One claimed attempt.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "columns of tasker.attempts, explained there")]
pub struct Attempt {
    pub step: Uuid,
    pub attempt: i32,
    pub worker: String,
    pub worker_version: Option<String>,
    pub message_id: Option<i64>,
    pub result_message_id: Option<i64>,
    pub claim_began_at: DateTime<Utc>,
    pub claimed_at: DateTime<Utc>,
    pub report_began_at: Option<DateTime<Utc>>,
    pub reported_at: Option<DateTime<Utc>>,
    pub start_offset_ms: Option<f64>,
    pub run_ms: Option<f64>,
    pub failure: Option<Failure>,
    pub usage: Option<Value>,
    pub milestones: Option<Value>,
}

/// What the template says of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "columns of tasker.template_steps")]
pub struct StepInfo {
    pub index: u32,
    /// Its index in the list that a map runs over.
    pub item: Option<u32>,
    pub name: Arc<str>,
    pub handler: Arc<str>,
    pub queue: Arc<str>,
    pub max_attempts: u32,
}
