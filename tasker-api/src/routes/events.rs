//! Live changes, as server-sent events.

use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use schemars::JsonSchema;
use serde::Deserialize;
use tasker_shared::redact;
use tasker_shared::store::views::TaskView;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::tasks::visible;
use crate::Caller;
use crate::auth::Scope;
use crate::hub::{Change, Watching};
use crate::operation::{Api, Call, Nothing, Operation};
use crate::problem::Problem;
use crate::shares::{Share, no_stream};

pub(super) fn add(api: &mut Api) {
    let about = "Server-sent events. `hello` at once; `task` with the task whenever it or a step of it moved; `many` \
                 when so much moved that a list is best read anew";
    api.add_raw(Operation::get("/v1/events", "events", about), Scope::TasksRead, "text/event-stream", events);
}

/// What to hear of.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventQuery {
    /// Of this namespace only.
    namespace: Option<String>,
    /// Of this task only.
    task: Option<Uuid>,
}

async fn events(call: Call<Nothing, EventQuery, Nothing>) -> Result<Response, Problem> {
    if let Some(namespace) = &call.query.namespace {
        call.who.require(Scope::TasksRead, namespace)?;
    }
    if let Some(task) = call.query.task {
        visible(&call, task).await?;
    }
    let place = call.state.room().streams.one(call.who.key_id.clone()).map_err(no_stream)?;
    let live = Live {
        watching: call.state.hub().watch(call.who.credential()),
        who: call.who,
        wanted: call.query,
        stop: call.state.stop().clone(),
        ready: vec![Event::default().event("hello").data("{}")],
        _place: place,
    };
    let stream = stream::unfold(live, |mut live| async move {
        let event = live.next().await?;
        Some((Ok::<_, Infallible>(event), live))
    });
    let mut response = Sse::new(stream).keep_alive(KeepAlive::default()).into_response();
    // A proxy that gathers what it passes on would gather for ever.
    response.headers_mut().insert("x-accel-buffering", http::HeaderValue::from_static("no"));
    Ok(response)
}

/// A task as an event, without the secrets that the redaction rules know.
fn event(task: &TaskView) -> Option<Event> {
    let value = serde_json::to_value(task).ok()?;
    Event::default().event("task").json_data(redact::shown(&value).unwrap_or(value)).ok()
}

/// One who hears.
struct Live {
    watching: Watching,
    who: Caller,
    wanted: EventQuery,
    stop: CancellationToken,
    /// Events that are to be sent, the last one first.
    ready: Vec<Event>,
    _place: Share<String>,
}

impl Live {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop() {
                return Some(event);
            }
            let change = tokio::select! {
                change = self.watching.next() => change?,
                () = self.stop.cancelled() => return None,
            };
            match change {
                Change::Tasks(tasks) => {
                    let mine = tasks.iter().rev().filter(|task| self.wants(task));
                    let events = mine.filter_map(event);
                    self.ready = events.collect();
                }
                Change::Many => return Some(Event::default().event("many").data("{}")),
                Change::Ended(_) => {}
            }
        }
    }

    fn wants(&self, task: &TaskView) -> bool {
        self.who.reaches(&task.namespace)
            && self.wanted.namespace.as_ref().is_none_or(|namespace| *namespace == task.namespace)
            && self.wanted.task.is_none_or(|wanted| wanted == task.task_uuid)
    }
}
