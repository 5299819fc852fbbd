//! How long finished tasks and quarantined messages are kept.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use tasker_shared::store::retention::{self, Policy};

use super::{Accepted, Page};
use crate::Caller;
use crate::auth::Scope;
use crate::operation::{Answer, Api, Call, Nothing, Operation};
use crate::problem::Problem;

/// Ten years: what is kept longer is kept for ever.
const LONGEST_S: u64 = 315_576_000;
const SHORTEST_S: u64 = 3600;

pub(super) fn add(api: &mut Api) {
    let (read, write) = (Scope::LimitsRead, Scope::LimitsWrite);
    let path = "/v1/retention";
    api.add(Operation::get(path, "list_retention", "How long what has ended is kept, by namespace"), read, list);
    let about = "Keep what has ended so long; namespace * is for all that have no policy of their own";
    api.add(Operation::put(path, "set_retention", about), write, set);
    api.add(Operation::delete(path, "remove_retention", "Remove the policy of a namespace"), write, remove);
}

/// The policy of all namespaces together is seen by everybody, since it is everybody's.
async fn list(call: Call<Nothing, Nothing, Nothing>) -> Answer<Page<Policy>> {
    let mut items = retention::list(&mut *call.database.conn().await?).await?;
    items.retain(|policy| policy.namespace == "*" || call.who.reaches(&policy.namespace));
    Ok(Page { items, next: None }.into())
}

/// A policy.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewPolicy {
    /// The namespace, or * for all that have no policy of their own.
    namespace: String,
    /// Seconds that a finished task is kept; for ever if not given.
    #[schemars(range(min = 3600, max = 315_576_000))]
    keep_s: Option<u64>,
    /// Seconds that a quarantined message is kept; for ever if not given.
    #[schemars(range(min = 3600, max = 315_576_000))]
    keep_quarantine_s: Option<u64>,
    /// Whether only somebody who writes an archive may remove.
    #[serde(default)]
    archive: bool,
}

fn allowed(who: &Caller, namespace: &str) -> Result<(), Problem> {
    if namespace == "*" {
        who.require_everywhere(Scope::LimitsWrite)
    } else {
        who.require(Scope::LimitsWrite, namespace)
    }
}

async fn set(call: Call<Nothing, Nothing, NewPolicy>) -> Answer<Accepted> {
    let NewPolicy { namespace, keep_s, keep_quarantine_s, archive } = call.body;
    allowed(&call.who, &namespace)?;
    for (field, seconds) in [("keep_s", keep_s), ("keep_quarantine_s", keep_quarantine_s)] {
        if seconds.is_some_and(|seconds| !(SHORTEST_S..=LONGEST_S).contains(&seconds)) {
            return Err(Problem::invalid(
                field,
                "must be a number of seconds from 3600 (an hour) to 315576000 (ten years)",
            ));
        }
    }
    if keep_s.is_none() && keep_quarantine_s.is_none() {
        return Err(Problem::invalid("keep_s", "give it, keep_quarantine_s or both; DELETE removes a policy"));
    }
    let (keep, quarantine) = (keep_s.map(Duration::from_secs), keep_quarantine_s.map(Duration::from_secs));
    call.state.client().set_retention(&namespace, keep, quarantine, archive, Some(&call.who.name)).await?;
    Ok(Accepted::YES.into())
}

/// Which policy.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PolicyQuery {
    /// The namespace, or *.
    namespace: String,
}

async fn remove(call: Call<Nothing, PolicyQuery, Nothing>) -> Answer<Accepted> {
    let namespace = &call.query.namespace;
    allowed(&call.who, namespace)?;
    let policies = retention::list(&mut *call.database.conn().await?).await?;
    if !policies.iter().any(|policy| policy.namespace == *namespace) {
        return Err(Problem::not_found("such policy"));
    }
    call.state.client().set_retention(namespace, None, None, false, Some(&call.who.name)).await?;
    Ok(Accepted::YES.into())
}
