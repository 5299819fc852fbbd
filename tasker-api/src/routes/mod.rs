//! What the API can do: one file per resource. The order here is the order of the document.

mod health;
mod sign_in;
mod tasks;

use axum::Router;
use schemars::JsonSchema;
use serde::Serialize;

use crate::State;
use crate::operation::Api;
use crate::problem::Problem;

/// Declares every operation.
pub(crate) fn add(api: &mut Api) {
    health::add(api);
    tasks::add(api);
}

/// What is for browsers and probes, not for programs.
pub(crate) fn outside_the_api() -> Router<State> {
    sign_in::routes()
}

/// Some of a list, and where it goes on.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "{T}List")]
pub struct Page<T> {
    /// In the order of the list.
    pub items: Vec<T>,
    /// The `after` of the next page; null: there is no more.
    pub next: Option<String>,
}

/// How many of a list: 1 to 500, 50 if not said.
pub(crate) fn limit(asked: Option<u32>) -> Result<u32, Problem> {
    match asked {
        None => Ok(50),
        Some(limit @ 1..=500) => Ok(limit),
        Some(_) => Err(Problem::invalid("limit", "must be a number from 1 to 500")),
    }
}

/// A wish was taken; an orchestrator decides a moment later.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct Accepted {
    /// Always true.
    pub accepted: bool,
}

impl Accepted {
    /// It was.
    pub const YES: Self = Self { accepted: true };
}
