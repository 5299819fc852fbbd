//! What the HTTP API and its Rust client say to each other, declared once.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::store::why::Situation;

/// Why a request was refused: RFC 9457 problem details.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// Stable; what a program may branch on.
    pub code: Cow<'static, str>,
    /// One line that is the same for every problem of this code.
    pub title: Cow<'static, str>,
    /// The HTTP status.
    pub status: u16,
    /// Which field, what is wrong with it, what to do.
    pub detail: String,
    /// The field that is at fault, with dots and indexes, such as `tasks[2].input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// Every problem that was found, where there may be several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Finding>,
    /// In how many seconds it is worth trying again: the header `Retry-After`.
    #[serde(skip)]
    pub retry_after: Option<u64>,
}

/// One of several problems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// Where: a field, or a key of a template.
    pub field: String,
    /// From 1, in a template file; absent elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// What is wrong and what to do.
    pub detail: String,
}

/// Some of a list, and where it goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "{T}List")]
pub struct Page<T> {
    /// In the order of the list.
    pub items: Vec<T>,
    /// The `after` of the next page; null: there is no more.
    pub next: Option<String>,
}

impl<T> Page<T> {
    /// Cuts a list that was read with one row more than asked for, and names its last row.
    pub fn cut(mut items: Vec<T>, limit: u32, cursor: impl Fn(&T) -> String) -> Self {
        let most = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = items.len() > most;
        items.truncate(most);
        let next = items.last().filter(|_| more).map(cursor);
        Self { items, next }
    }
}

/// Which tasks a list shows; the empty query lists all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskQuery {
    /// Of this namespace only.
    pub namespace: Option<String>,
    /// Of this template only, in any version.
    pub template: Option<String>,
    /// One or more of queued, running, waiting, suspended, completed, failed, cancelled, with commas between them.
    pub status: Option<String>,
    /// With this correlation id only.
    pub correlation_id: Option<String>,
    /// With this idempotency key only.
    pub idempotency_key: Option<String>,
    /// That failed, or are blocked, with an error of this type.
    pub error_type: Option<String>,
    /// Created at this time or later.
    pub created_from: Option<DateTime<Utc>>,
    /// Created before this time.
    pub created_to: Option<DateTime<Utc>>,
    /// The `next` of the page before this one.
    pub after: Option<Uuid>,
    /// How many, 1 to 500; 50 if not given. A page may have fewer and still not be the last: go on while `next` is there.
    pub limit: Option<u32>,
}

/// What became of each task of a batch, in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BatchAnswer {
    /// One for each.
    pub results: Vec<BatchItem>,
}

/// A task of a batch, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BatchItem {
    /// The task; null: it was refused.
    pub task_uuid: Option<Uuid>,
    /// Whether it was submitted just now.
    pub is_new: bool,
    /// Why it was refused: `invalid_request`, `idempotency_conflict` or `forbidden`.
    pub code: Option<Cow<'static, str>>,
    /// The field and the rule.
    pub detail: Option<String>,
}

/// What a task waits for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Why {
    /// The public status, a colon, and the reason.
    pub sentence: String,
    /// What the sentence is made from.
    pub situation: Situation,
}

/// What a task came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TaskResult {
    /// The outputs of the completed steps that no other step depends on, by step name.
    pub outputs: BTreeMap<String, Value>,
}

/// Which tasks are acted on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BulkFilter {
    /// Of this namespace only; needed with a key that has only some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Of this template only, in any version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// With this public status only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// With this correlation id only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// The `next` of the page before this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Uuid>,
}

/// What to do to many tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Bulk {
    /// At least one of its fields besides `after`.
    pub filter: BulkFilter,
    /// What to do.
    pub action: BulkAction,
    /// Whether to say only what would be done.
    #[serde(default = "yes")]
    pub dry_run: bool,
    /// Why, for the audit.
    #[schemars(length(max = 1000))]
    pub reason: Option<String>,
}

fn yes() -> bool {
    true
}

/// An act that needs nothing but the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each is what the operation of that name does")]
pub enum BulkAction {
    Cancel,
    Terminate,
    Suspend,
    Resume,
    Retry,
    GiveUp,
    Resolve,
}

/// What was done to many tasks, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BulkAnswer {
    /// Tasks that match and allow the act.
    pub matched: i64,
    /// Tasks whose request was sent.
    pub asked: i64,
    /// Whether nothing was done.
    pub dry_run: bool,
    /// Some of the tasks.
    pub sample: Vec<Uuid>,
    /// The filter's `after` of the next page; null: that was all.
    pub next: Option<Uuid>,
}
