//! Tasks: a task is one run of a workflow.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Deserialize;
use tasker_shared::store::listing::{self, Filter};
use tasker_shared::store::views::{self, TaskView};
use uuid::Uuid;

use super::{Page, limit};
use crate::auth::Scope;
use crate::guard::Caller;
use crate::operation::{Answer, Api, Call, Nothing, Operation};
use crate::problem::Problem;

pub(super) fn add(api: &mut Api) {
    let read = Scope::TasksRead;
    api.add(Operation::get("/v1/tasks", "list_tasks", "The latest tasks that match, newest first"), read, list);
    api.add(Operation::get("/v1/tasks/{task}", "get_task", "One task"), read, get);
}

/// A task.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TaskPath {
    /// The task's uuid.
    pub task: Uuid,
}

/// Which tasks.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TaskQuery {
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

impl TaskQuery {
    /// What the database is asked for, within what the caller may see.
    pub fn filter(self, who: &Caller) -> Result<Filter, Problem> {
        if let Some(namespace) = &self.namespace {
            who.require(Scope::TasksRead, namespace)?;
        }
        let statuses: Vec<String> = match &self.status {
            None => Vec::new(),
            Some(list) => list.split(',').map(|word| word.trim().to_owned()).collect(),
        };
        if statuses.iter().any(|status| views::states_of(status).next().is_none()) {
            return Err(Problem::invalid(
                "status",
                "must be queued, running, waiting, suspended, completed, failed or cancelled; several with commas between them",
            ));
        }
        let namespaces = match self.namespace {
            Some(namespace) => Some(vec![namespace]),
            None => who.namespaces().map(<[String]>::to_vec),
        };
        Ok(Filter {
            namespaces,
            template: self.template,
            statuses,
            correlation_id: self.correlation_id,
            idempotency_key: self.idempotency_key,
            error_type: self.error_type,
            created_from: self.created_from,
            created_to: self.created_to,
            after: self.after,
            limit: limit(self.limit)?,
        })
    }
}

async fn list(call: Call<Nothing, TaskQuery, Nothing>) -> Answer<Page<TaskView>> {
    let filter = call.query.filter(&call.who)?;
    let found = listing::tasks(&mut *call.state.pool().acquire().await?, &filter).await?;
    Ok(Page { items: found.tasks, next: found.next.map(|after| after.to_string()) }.into())
}

/// The task, if the caller may know of it: a task of another namespace does not exist for them.
pub(crate) async fn visible<P, Q, B>(call: &Call<P, Q, B>, task: Uuid) -> Result<TaskView, Problem> {
    let found = views::these(&mut *call.state.pool().acquire().await?, &[task]).await?.pop();
    found.filter(|found| call.who.reaches(&found.namespace)).ok_or_else(|| Problem::not_found(format!("task {task}")))
}

async fn get(call: Call<TaskPath, Nothing, Nothing>) -> Answer<TaskView> {
    Ok(visible(&call, call.path.task).await?.into())
}
