//! Schedules: tasks by the clock.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tasker_shared::client::ClientError;
use tasker_shared::schedule::Schedule;
use tasker_shared::store::schedules::ScheduleView;
use uuid::Uuid;

use super::{Accepted, NamespaceQuery, Page, Reason, own_namespaces};
use crate::auth::Scope;
use crate::operation::{Answer, Api, Call, Nothing, Operation};
use crate::problem::Problem;

pub(super) fn add(api: &mut Api) {
    let (read, write) = (Scope::SchedulesRead, Scope::SchedulesWrite);
    api.add(Operation::get("/v1/schedules", "list_schedules", "Every schedule, by name"), read, list);
    api.add(
        Operation::put("/v1/schedules", "set_schedule", "Create a schedule, or change the one of that name"),
        write,
        set,
    );
    api.add(
        Operation::get("/v1/schedules/{namespace}/{name}", "get_schedule", "One schedule and its next ticks"),
        read,
        get,
    );
    api.add(
        Operation::delete("/v1/schedules/{namespace}/{name}", "delete_schedule", "Delete a schedule; its tasks stay"),
        write,
        delete,
    );
    api.add(
        Operation::post(
            "/v1/schedules/{namespace}/{name}/pause",
            "pause_schedule",
            "What would tick meanwhile never runs",
        ),
        write,
        |call| pause(call, true),
    );
    api.add(
        Operation::post("/v1/schedules/{namespace}/{name}/resume", "resume_schedule", "Let a paused schedule go on"),
        write,
        |call| pause(call, false),
    );
    api.add(
        Operation::post(
            "/v1/schedules/{namespace}/{name}/trigger",
            "trigger_schedule",
            "Run it now; its next tick comes as planned",
        ),
        write,
        trigger,
    );
}

/// A schedule.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SchedulePath {
    /// Its namespace.
    namespace: String,
    /// Its name.
    name: String,
}

impl SchedulePath {
    fn parts(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

/// An input is a payload.
fn shown<P, Q, B>(call: &Call<P, Q, B>, mut schedule: ScheduleView) -> ScheduleView {
    if !call.who.may(Scope::PayloadsRead, &schedule.namespace) {
        schedule.input = json!(null);
    }
    schedule
}

async fn list(call: Call<Nothing, NamespaceQuery, Nothing>) -> Answer<Page<ScheduleView>> {
    let named = own_namespaces(&call.who, Scope::SchedulesRead, call.query.namespace.clone())?;
    let only = named.as_deref().and_then(|names| if let [one] = names { Some(one.as_str()) } else { None });
    let found = call.state.client().schedules(only).await?.into_iter();
    let own = found.filter(|found| call.who.reaches(&found.namespace));
    Ok(Page { items: own.map(|schedule| shown(&call, schedule)).collect(), next: None }.into())
}

/// A schedule, and when it ticks next.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ScheduleAndTicks {
    /// The schedule. Without the scope payloads:read its input is null.
    schedule: ScheduleView,
    /// The next five ticks; none if it is paused or has ended.
    next_ticks: Vec<DateTime<Utc>>,
}

/// The schedule, if the caller may know of it.
async fn visible<Q, B>(call: &Call<SchedulePath, Q, B>) -> Result<ScheduleView, Problem> {
    let (namespace, name) = call.path.parts();
    let unknown = || Problem::not_found(format!("schedule {namespace}/{name}"));
    if !call.who.reaches(namespace) {
        return Err(unknown());
    }
    call.state.client().schedule(namespace, name).await?.ok_or_else(unknown)
}

async fn get(call: Call<SchedulePath, Nothing, Nothing>) -> Answer<ScheduleAndTicks> {
    let schedule = visible(&call).await?;
    let next_ticks = schedule.next_ticks(5);
    Ok(ScheduleAndTicks { schedule: shown(&call, schedule), next_ticks }.into())
}

/// What became of a schedule.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ScheduleSet {
    /// created, changed or unchanged.
    answer: String,
}

async fn set(call: Call<Nothing, Nothing, Schedule>) -> Answer<ScheduleSet> {
    call.who.require(Scope::SchedulesWrite, &call.body.namespace)?;
    let answer = call.state.client().set_schedule(&call.body, Some(&call.who.name)).await?;
    Ok(ScheduleSet { answer }.into())
}

fn gone(error: ClientError) -> Problem {
    match error {
        ClientError::Refused(text) if text == "no such schedule" => Problem::not_found("such schedule"),
        other => other.into(),
    }
}

async fn delete(call: Call<SchedulePath, Nothing, Reason>) -> Answer<Accepted> {
    visible(&call).await?;
    let (actor, reason) = (Some(call.who.name.as_str()), call.body.reason.as_deref());
    call.state.client().delete_schedule(call.path.parts(), actor, reason).await.map_err(gone)?;
    Ok(Accepted::YES.into())
}

async fn pause(call: Call<SchedulePath, Nothing, Reason>, pause: bool) -> Answer<Accepted> {
    visible(&call).await?;
    let (actor, reason) = (Some(call.who.name.as_str()), call.body.reason.as_deref());
    call.state.client().pause_schedule(call.path.parts(), pause, actor, reason).await.map_err(gone)?;
    Ok(Accepted::YES.into())
}

/// The task that a schedule was made to submit.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Triggered {
    /// The task.
    task_uuid: Uuid,
}

async fn trigger(call: Call<SchedulePath, Nothing, Reason>) -> Answer<Triggered> {
    visible(&call).await?;
    let (actor, reason) = (Some(call.who.name.as_str()), call.body.reason.as_deref());
    let task_uuid = call.state.client().trigger_schedule(call.path.parts(), actor, reason).await.map_err(gone)?;
    Ok(Triggered { task_uuid }.into())
}
