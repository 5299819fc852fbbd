//! Queues of steps, the messages that nobody could use, and who reads them.

use schemars::JsonSchema;
use serde::Deserialize;
use tasker_shared::client::ClientError;
use tasker_shared::store::details::{self, OrchestratorRow, QuarantineFilter, Quarantined, WorkerRow};
use tasker_shared::store::requests;
use tasker_shared::store::views::{self, QueueView};

use super::{Accepted, NamespaceQuery, Page, Reason, limit, own_namespaces};
use crate::Caller;
use crate::auth::Scope;
use crate::operation::{Answer, Api, Call, Nothing, Operation};
use crate::problem::Problem;

pub(super) fn add(api: &mut Api) {
    let (read, operate) = (Scope::QueuesRead, Scope::QueuesOperate);
    api.add(
        Operation::get("/v1/queues", "list_queues", "Every queue: how deep, how old, how much is held back"),
        read,
        list,
    );
    api.add(
        Operation::post("/v1/queues/{queue}/pause", "pause_queue", "Send and claim nothing more; what runs runs on"),
        operate,
        |call| pause(call, true),
    );
    api.add(
        Operation::post("/v1/queues/{queue}/resume", "resume_queue", "Let a paused queue go on"),
        operate,
        |call| pause(call, false),
    );
    api.add(
        Operation::get("/v1/quarantine", "list_quarantine", "Messages that nobody could use, newest first"),
        read,
        quarantine,
    );
    api.add(
        Operation::post("/v1/quarantine/{message}/requeue", "requeue_message", "Send it to its queue again"),
        operate,
        requeue,
    );
    api.add(
        Operation::post("/v1/quarantine/{message}/discard", "discard_message", "Delete it for good"),
        operate,
        discard,
    );
    api.add(Operation::get("/v1/workers", "list_workers", "Who executes steps, and which"), read, workers);
    api.add(
        Operation::get("/v1/orchestrators", "list_orchestrators", "Who decides what happens next"),
        read,
        orchestrators,
    );
}

/// The namespace of a queue of steps: `worker_shop` and `worker_shop__slow` are of shop.
fn namespace_of(queue: &str) -> Option<&str> {
    queue.strip_prefix("worker_").map(|rest| rest.split_once("__").map_or(rest, |(namespace, _)| namespace))
}

/// The common queues carry what is of every namespace.
fn reaches(who: &Caller, queue: &str) -> bool {
    match namespace_of(queue) {
        Some(namespace) => who.reaches(namespace),
        None => who.namespaces().is_none(),
    }
}

async fn list(call: Call<Nothing, Nothing, Nothing>) -> Answer<Page<QueueView>> {
    let mut items = views::queues(&mut *call.database.conn().await?).await?;
    items.retain(|found| reaches(&call.who, &found.queue));
    Ok(Page { items, next: None }.into())
}

/// A queue.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct QueuePath {
    /// Its name, such as `worker_shop`.
    queue: String,
}

async fn pause(call: Call<QueuePath, Nothing, Reason>, pause: bool) -> Answer<Accepted> {
    let queue = &call.path.queue;
    let unknown = || Problem::not_found("such queue of steps");
    if !reaches(&call.who, queue) || namespace_of(queue).is_none() {
        return Err(unknown());
    }
    let (client, actor, reason) = (call.state.client(), Some(call.who.name.as_str()), call.body.reason.as_deref());
    let done = if pause {
        client.pause_queue(queue, actor, reason).await
    } else {
        client.resume_queue(queue, actor, reason).await
    };
    done.map_err(|error| match error {
        ClientError::Refused(text) if text.starts_with("no such queue") => unknown(),
        other => other.into(),
    })?;
    Ok(Accepted::YES.into())
}

/// Which messages.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct QuarantineQuery {
    /// Of this queue only.
    queue: Option<String>,
    /// The `next` of the page before this one.
    after: Option<i64>,
    /// How many, 1 to 500; 50 if not given.
    limit: Option<u32>,
}

async fn quarantine(call: Call<Nothing, QuarantineQuery, Nothing>) -> Answer<Page<Quarantined>> {
    let limit = limit(call.query.limit)?;
    let filter = QuarantineFilter {
        queue: call.query.queue.as_deref(),
        namespaces: call.who.namespaces(),
        before: call.query.after,
        ..QuarantineFilter::default()
    };
    let mut conn = call.database.conn().await?;
    let found = details::quarantine(&mut conn, filter, call.who.has(Scope::PayloadsRead), i64::from(limit) + 1).await?;
    Ok(Page::cut(found, limit, |row| row.quarantine_id.to_string()).into())
}

/// A message in quarantine.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MessagePath {
    /// Its `quarantine_id`.
    message: i64,
}

fn no_message(id: i64) -> Problem {
    Problem::not_found(format!("message {id} in quarantine"))
}

async fn visible<Q, B>(call: &Call<MessagePath, Q, B>) -> Result<(), Problem> {
    let id = call.path.message;
    let only = QuarantineFilter { id: Some(id), namespaces: call.who.namespaces(), ..QuarantineFilter::default() };
    let found = details::quarantine(&mut *call.database.conn().await?, only, false, 1).await?;
    if found.is_empty() { Err(no_message(id)) } else { Ok(()) }
}

async fn requeue(call: Call<MessagePath, Nothing, Reason>) -> Answer<Accepted> {
    visible(&call).await?;
    let (id, actor, reason) = (call.path.message, Some(call.who.name.as_str()), call.body.reason.as_deref());
    let done = requests::requeue(&mut *call.database.conn().await?, id, actor, reason).await?;
    done.map(|_| Accepted::YES.into()).ok_or_else(|| no_message(id))
}

async fn discard(call: Call<MessagePath, Nothing, Reason>) -> Answer<Accepted> {
    visible(&call).await?;
    let (id, actor, reason) = (call.path.message, Some(call.who.name.as_str()), call.body.reason.as_deref());
    let done = requests::discard(&mut *call.database.conn().await?, id, actor, reason).await?;
    if done { Ok(Accepted::YES.into()) } else { Err(no_message(id)) }
}

async fn workers(call: Call<Nothing, NamespaceQuery, Nothing>) -> Answer<Page<WorkerRow>> {
    let named = own_namespaces(&call.who, Scope::QueuesRead, call.query.namespace)?;
    let items = details::workers(&mut *call.database.conn().await?, named.as_deref()).await?;
    Ok(Page { items, next: None }.into())
}

async fn orchestrators(call: Call<Nothing, Nothing, Nothing>) -> Answer<Page<OrchestratorRow>> {
    let items = details::orchestrators(&mut *call.database.conn().await?).await?;
    Ok(Page { items, next: None }.into())
}
