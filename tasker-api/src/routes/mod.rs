//! What the API can do: one file per resource. The order here is the order of the document.

mod acts;
mod events;
mod health;
mod queues;
mod retention;
mod schedules;
mod sign_in;
mod system;
mod tasks;
mod templates;
mod trace;

use axum::Router;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use tasker_shared::client::wire::Page;

use crate::auth::Scope;
use crate::operation::Api;
use crate::problem::Problem;
use crate::{Caller, State};

/// Declares every operation.
pub(crate) fn add(api: &mut Api) {
    health::add(api);
    tasks::add(api);
    acts::add(api);
    events::add(api);
    templates::add(api);
    schedules::add(api);
    queues::add(api);
    system::add(api);
    retention::add(api);
    trace::add(api);
}

/// What is for browsers and probes, not for programs.
pub(crate) fn outside_the_api() -> Router<State> {
    sign_in::routes()
}

/// How many of a list: 1 to 500, 50 if not said.
pub(crate) fn limit(asked: Option<u32>) -> Result<u32, Problem> {
    match asked {
        None => Ok(50),
        Some(limit @ 1..=500) => Ok(limit),
        Some(_) => Err(Problem::invalid("limit", "must be a number from 1 to 500")),
    }
}

/// The namespaces that a list may show: the one that was named, else the caller's own; `None`: all.
pub(crate) fn own_namespaces(
    who: &Caller,
    scope: Scope,
    named: Option<String>,
) -> Result<Option<Vec<String>>, Problem> {
    match named {
        Some(namespace) => {
            who.require(scope, &namespace)?;
            Ok(Some(vec![namespace]))
        }
        None => Ok(who.namespaces().map(<[String]>::to_vec)),
    }
}

/// The namespace of which a list is asked for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamespaceQuery {
    /// Of this namespace only.
    pub namespace: Option<String>,
}

/// Why somebody does something, for the audit.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Reason {
    /// Up to 1000 characters.
    #[schemars(length(max = 1000))]
    pub reason: Option<String>,
}

/// A request was accepted; an orchestrator decides a moment later.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct Accepted {
    /// Always true.
    pub accepted: bool,
}

impl Accepted {
    /// It was.
    pub const YES: Self = Self { accepted: true };
}
