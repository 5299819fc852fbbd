//! A checked template as the core reads it: steps by index, and their graph.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::condition::Condition;
use super::flow::{Allows, GROUP_SEPARATOR, Limit, Rule, resolve_key};
use super::graph::Graph;
use super::input::{InputTemplate, Reference};
use super::kinds::Share;
use super::retry::RetryPolicy;
use super::wait::Work;

/// The most items of one map.
pub const MAX_ITEMS: u32 = 100_000;

/// One version of a template, immutable.
#[derive(Debug, Clone)]
pub struct Definition {
    /// Its row; 0 before it is registered.
    pub template_id: i32,
    /// The namespace that owns it.
    pub namespace: Arc<str>,
    /// Its name: the `task_name` of its tasks.
    pub name: Arc<str>,
    /// Its version.
    pub version: Arc<str>,
    /// Whether a permanently failed step leaves the task `blocked_by_failures` (else it fails).
    pub block_on_failure: bool,
    /// The longest a task may take, waits included.
    pub total: Option<Duration>,
    /// In file order; a step's index is its position here.
    pub steps: Vec<StepDefinition>,
    /// Who depends on whom.
    pub graph: Graph,
    /// Name -> index.
    pub by_name: HashMap<Arc<str>, u32>,
    /// Whether an event may reach further than the steps directly behind it, because a step may
    /// be skipped or a map may end: only then is more looked at.
    pub reaches_far: bool,
    /// Whose turn held steps are, when they are equally urgent; `None`: all one's.
    pub fair_key: Option<InputTemplate>,
}

impl Definition {
    /// The key of a step in a snapshot: its index, or for an item of a map a number beyond every index.
    pub fn key(&self, index: u32, item: Option<u32>) -> u32 {
        let steps = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
        // 20,000 steps of 100,000 items each are fewer than 2^31.
        item.map_or(index, |item| steps + index * MAX_ITEMS + item)
    }

    /// The index and the item of a key.
    pub fn position(&self, key: u32) -> (u32, Option<u32>) {
        let steps = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
        key.checked_sub(steps).map_or((key, None), |item| (item / MAX_ITEMS, Some(item % MAX_ITEMS)))
    }

    /// The limits that the template sets for a step of a task with this input; the problem of the
    /// first key that leads nowhere.
    pub fn limits(&self, index: u32, input: &Value) -> Result<Vec<Limit>, String> {
        let rules = self.steps[index as usize].limits.iter();
        rules
            .map(|rule| {
                let key = rule.key.as_ref().map(|key| resolve_key(key, input)).transpose();
                let (what, prefix) = match rule.allows {
                    Allows::AtOnce(_) => ("concurrency", ""),
                    Allows::Rate(..) => ("rate", "rate "),
                };
                let name = match key.map_err(|problem| format!("{what}.key: {problem}"))? {
                    Some(key) => format!("{prefix}{}/{key}", rule.scope),
                    None => format!("{prefix}{}", rule.scope),
                };
                Ok(Limit { name, allows: rule.allows })
            })
            .collect()
    }

    /// The hold group in which a step waits when it is held: steps of one group are subject to the same
    /// limits and have one fair key. The fair key comes first, then the handler, then the limits.
    pub fn hold_group(&self, index: u32, input: &Value) -> Result<String, String> {
        let fair = self.fair_key.as_ref().map(|key| resolve_key(key, input)).transpose();
        let mut group = fair.map_err(|problem| format!("fair_key: {problem}"))?.unwrap_or_default();
        group.push(GROUP_SEPARATOR);
        group.push_str(&self.steps[index as usize].handler);
        for limit in self.limits(index, input)? {
            group.push(GROUP_SEPARATOR);
            group.push_str(&limit.name);
        }
        Ok(group)
    }

    /// Whether its template alone gives a step a hold group.
    pub fn has_hold_group(&self, index: u32) -> bool {
        self.fair_key.is_some() || !self.steps[index as usize].limits.is_empty()
    }
}

/// One step of a template.
#[derive(Debug, Clone)]
pub struct StepDefinition {
    /// Unique within the template.
    pub name: Arc<str>,
    /// What it does once it is ready.
    pub work: Work,
    /// The name of the user's code; empty where no handler runs.
    pub handler: Arc<str>,
    /// The full queue name, `worker_<namespace>` or `worker_<namespace>__<queue>`.
    pub queue: Arc<str>,
    /// Added to the task's; higher runs first among held steps.
    pub priority: i32,
    /// When and how often to try again.
    pub retry: RetryPolicy,
    /// The longest it may lie in its queue.
    pub queue_timeout: Option<Duration>,
    /// The longest it may take from when it is first ready to its end, waits and retries included.
    pub total: Option<Duration>,
    /// The longest one attempt may run.
    pub run_timeout: Option<Duration>,
    /// The input with its `${…}` references; `None` hands over the task's input and the parents' outputs.
    pub input: Option<InputTemplate>,
    /// The steps whose outputs it reads, by index: those its input names, or its parents, and
    /// what its condition looks at.
    pub needs: Vec<u32>,
    /// What must hold once its dependencies are done, or it is skipped.
    pub when: Option<Condition>,
    /// Of a decision: the dependents among which its output chooses.
    pub branches: Vec<u32>,
    /// Which of its dependencies must be done.
    pub join: Join,
    /// Its limits, and those that all steps of the template share.
    pub limits: Vec<Rule>,
    /// Of a map: what it runs over.
    pub for_each: Option<ForEach>,
}

impl StepDefinition {
    /// Whether anything may be due for it that outlasts it: a timeout, or the end of a wait.
    pub fn has_timers(&self) -> bool {
        self.queue_timeout.is_some() || self.total.is_some() || matches!(self.work, Work::Wait(_))
    }
}

/// The most items of one map that are open at once, and how many are unless the template says less.
pub const MAX_PARALLEL: u32 = 1000;

/// A step that is run once for each item of a list.
#[derive(Debug, Clone)]
pub struct ForEach {
    /// Where the list is.
    pub reference: Reference,
    /// The most items that are open at once.
    pub max_parallel: u32,
    /// What failed items mean for the whole.
    pub on_item_failure: OnItemFailure,
    /// The steps whose outputs the input of each item reads, by index.
    pub needs: Vec<u32>,
}

/// What items that have failed for good mean for their map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", try_from = "OnItemFailureForm")]
pub enum OnItemFailure {
    /// The first one fails the map.
    #[default]
    Fail,
    /// Their entries in the output are null.
    Continue,
    /// The same, unless there are more than so many.
    Count(u32),
    /// The same, unless they are more than this share of all, in percent.
    Percent(u32),
}

/// What failed items mean, as it is written: in a file, or where it is stored.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum OnItemFailureForm {
    /// The first one fails the map.
    Fail,
    /// Their entries in the output are null.
    Continue,
    /// As `continue`, unless more items than this have failed: a count, or a share of all such as `5%`.
    Threshold(Threshold),
    #[schemars(skip)]
    Count(u32),
    #[schemars(skip)]
    Percent(u32),
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Threshold {
    Count(#[schemars(range(min = 1, max = MAX_ITEMS))] u32),
    Percent(#[schemars(with = "Share")] String),
}

impl TryFrom<OnItemFailureForm> for OnItemFailure {
    type Error = String;

    fn try_from(form: OnItemFailureForm) -> Result<Self, String> {
        Ok(match form {
            OnItemFailureForm::Fail => Self::Fail,
            OnItemFailureForm::Continue => Self::Continue,
            OnItemFailureForm::Threshold(Threshold::Count(items)) | OnItemFailureForm::Count(items) => {
                Self::Count(items)
            }
            OnItemFailureForm::Threshold(Threshold::Percent(text)) => {
                let percent = text.strip_suffix('%').and_then(|number| number.parse().ok());
                Self::Percent(percent.ok_or_else(|| format!("`{text}` is not a share in percent"))?)
            }
            OnItemFailureForm::Percent(percent) => Self::Percent(percent),
        })
    }
}

/// Which of a step's dependencies must be done before it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Join {
    /// All of them; it is skipped as soon as one is skipped.
    #[default]
    All,
    /// All that were not skipped, and at least one.
    Taken,
    /// The first that is done.
    Any,
}
