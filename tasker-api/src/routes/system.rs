//! Namespaces and their limits, what operators did, and this process's metrics.

use std::time::Duration;

use axum::response::IntoResponse as _;
use http::header;
use schemars::JsonSchema;
use serde::Deserialize;
use tasker_shared::client::ClientError;
use tasker_shared::metrics::CONTENT_TYPE;
use tasker_shared::store::details::{self, AuditEntry, AuditFilter, NamespaceRow};
use tasker_shared::store::flow::{LimitUse, SetLimit};
use uuid::Uuid;

use super::{Accepted, NamespaceQuery, Page, limit, own_namespaces};
use crate::auth::Scope;
use crate::operation::{Answer, Api, Call, Nothing, Operation};
use crate::problem::Problem;

pub(super) fn add(api: &mut Api) {
    let (read, write) = (Scope::LimitsRead, Scope::LimitsWrite);
    api.add(Operation::get("/v1/namespaces", "list_namespaces", "Every namespace with a template"), read, namespaces);
    api.add(Operation::get("/v1/limits", "list_limits", "What is limited, and what of it is used now"), read, limits);
    api.add(Operation::put("/v1/limits", "set_limit", "Limit a namespace, or one handler in it"), write, set_limit);
    api.add(
        Operation::delete("/v1/limits", "remove_limit", "Remove a limit; what it held back goes on"),
        write,
        remove_limit,
    );
    api.add(Operation::get("/v1/audit", "list_audit", "What operators did, newest first"), Scope::AuditRead, audit);
    let metrics = Operation::get("/metrics", "metrics", "This process's metrics, for Prometheus");
    api.add_raw(
        metrics,
        Scope::MetricsRead,
        "application/openmetrics-text",
        |call: Call<Nothing, Nothing, Nothing>| async move {
            call.who.require_everywhere(Scope::MetricsRead)?;
            Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], call.state.scrape().text().await).into_response())
        },
    );
}

async fn namespaces(call: Call<Nothing, Nothing, Nothing>) -> Answer<Page<NamespaceRow>> {
    let items = details::namespaces(&mut *call.database.conn().await?, call.who.namespaces()).await?;
    Ok(Page { items, next: None }.into())
}

async fn limits(call: Call<Nothing, NamespaceQuery, Nothing>) -> Answer<Page<LimitUse>> {
    let named = own_namespaces(&call.who, Scope::LimitsRead, call.query.namespace)?;
    let only = named.as_deref().and_then(|names| if let [one] = names { Some(one.as_str()) } else { None });
    let mut items = call.state.client().limits(only).await?;
    items.retain(|found| call.who.reaches(&found.namespace));
    Ok(Page { items, next: None }.into())
}

/// A limit.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewLimit {
    /// Its namespace.
    namespace: String,
    /// One handler of it; all of the namespace if not given.
    handler: Option<String>,
    /// How many may be in flight at once.
    #[schemars(range(min = 1))]
    concurrency: Option<i32>,
    /// How many may be sent in each `per_ms`.
    #[schemars(range(min = 1))]
    rate: Option<i32>,
    /// Goes with `rate`.
    #[schemars(range(min = 1, max = 31_536_000_000_u64))]
    per_ms: Option<u64>,
    /// How many tasks of the namespace may be open; submits beyond it are refused. It protects the
    /// others, so a key that has only some namespaces may not set it.
    #[schemars(range(min = 1, max = 1_000_000))]
    open_tasks: Option<i32>,
    /// Why, for the audit.
    #[schemars(length(max = 1000))]
    reason: Option<String>,
}

async fn set_limit(call: Call<Nothing, Nothing, NewLimit>) -> Answer<Accepted> {
    let NewLimit { namespace, handler, concurrency, rate, per_ms, open_tasks, reason } = call.body;
    call.who.require(Scope::LimitsWrite, &namespace)?;
    if open_tasks.is_some() {
        call.who.require_everywhere(Scope::LimitsWrite)?;
        if handler.is_some() || concurrency.is_some() || rate.is_some() || per_ms.is_some() {
            return Err(Problem::invalid("open_tasks", "stands alone, of the whole namespace; set other limits apart"));
        }
        let (client, actor) = (call.state.client(), Some(call.who.name.as_str()));
        client.set_open_tasks_limit(&namespace, open_tasks, actor, reason.as_deref()).await?;
        return Ok(Accepted::YES.into());
    }
    if rate.is_some() != per_ms.is_some() {
        return Err(Problem::invalid("per_ms", "goes with rate: give both or neither"));
    }
    if per_ms.is_some_and(|per| per == 0 || per > 31_536_000_000) {
        return Err(Problem::invalid("per_ms", "must be a number of milliseconds from 1 to a year"));
    }
    let rate = rate.zip(per_ms.map(Duration::from_millis));
    let limit = SetLimit { namespace, handler, concurrency, rate };
    call.state.client().set_limit(&limit, Some(&call.who.name), reason.as_deref()).await?;
    Ok(Accepted::YES.into())
}

/// Which limit.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LimitQuery {
    /// Its namespace.
    namespace: String,
    /// The handler, if it is of one.
    handler: Option<String>,
    /// True: the one on open tasks.
    #[serde(default)]
    open_tasks: bool,
    /// Why, for the audit.
    reason: Option<String>,
}

async fn remove_limit(call: Call<Nothing, LimitQuery, Nothing>) -> Answer<Accepted> {
    let LimitQuery { namespace, handler, open_tasks, reason } = &call.query;
    call.who.require(Scope::LimitsWrite, namespace)?;
    let (client, actor, reason) = (call.state.client(), Some(call.who.name.as_str()), reason.as_deref());
    let done = if *open_tasks {
        call.who.require_everywhere(Scope::LimitsWrite)?;
        if handler.is_some() {
            return Err(Problem::invalid("open_tasks", "is of the whole namespace; leave out handler"));
        }
        client.set_open_tasks_limit(namespace, None, actor, reason).await
    } else {
        client.remove_limit((namespace.as_str(), handler.as_deref()), actor, reason).await
    };
    done.map_err(|error| match error {
        ClientError::Refused(text) if text.starts_with("there is no such limit") => Problem::not_found("such limit"),
        other => other.into(),
    })?;
    Ok(Accepted::YES.into())
}

/// Which acts.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AuditQuery {
    /// Done to this task only.
    task: Option<Uuid>,
    /// The `next` of the page before this one.
    after: Option<i64>,
    /// How many, 1 to 500; 50 if not given.
    limit: Option<u32>,
}

async fn audit(call: Call<Nothing, AuditQuery, Nothing>) -> Answer<Page<AuditEntry>> {
    let AuditQuery { task, after, limit: asked } = call.query;
    let limit = limit(asked)?;
    let mut conn = call.database.conn().await?;
    let filter = AuditFilter { task, namespaces: call.who.namespaces(), before: after, ..AuditFilter::default() };
    let payloads = call.who.has(Scope::PayloadsRead);
    let found = details::audit(&mut conn, filter, payloads, i64::from(limit) + 1).await?;
    Ok(Page::cut(found, limit, |entry| entry.audit_id.to_string()).into())
}
