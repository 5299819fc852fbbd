//! Whether this server lives, whether it can answer, and what it can do.

use std::time::Duration;

use axum::response::{IntoResponse as _, Response};
use axum::{Json, body::Body};
use http::{HeaderValue, header};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};
use tasker_shared::store::{tx, views};

use crate::State;
use crate::operation::{Api, Operation};
use crate::problem::UNAVAILABLE;

/// That it is well.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: &'static str,
}

pub(super) fn add(api: &mut Api) {
    let live = Operation::get("/health/live", "health_live", "Whether this process lives");
    api.public::<Health, _, _>(&live, |_| async { Json(Health { status: "ok" }).into_response() });
    let ready = Operation::get("/health/ready", "health_ready", "Whether the database answers");
    api.public::<Health, _, _>(&ready, ready_now);
    let document = Operation::get("/openapi.json", "openapi", "This document");
    api.public::<Map<String, Value>, _, _>(&document, |state: State| async move {
        let mut response = Response::new(Body::from(state.document.clone()));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    });
}

async fn ready_now(state: State) -> Response {
    let now = || async { views::now(&mut *state.pool().acquire().await?).await };
    let asked = async {
        match now().await {
            Err(error) if tx::was_lost(state.pool(), &error) => now().await,
            now => now,
        }
    };
    match tokio::time::timeout(Duration::from_secs(2), asked).await {
        Ok(Ok(_)) if !state.stop().is_cancelled() => {
            state.outage().answered();
            Json(Health { status: "ok" }).into_response()
        }
        _ => UNAVAILABLE.because("the database does not answer, or this server is about to end").into_response(),
    }
}
