//! The order workflow that `tasker up` brings along to be tried: its template, its inputs, and a
//! worker that runs it slowly enough to be watched.

use std::time::Duration;

use serde_json::Value;
use tasker_api::Example;
use tasker_shared::client::Client;
use tasker_shared::store::{templates, tx};
use tasker_shared::template;
use tasker_worker::{StepContext, Worker};

use order_fulfillment_example::{ORDERS, TEMPLATE, handlers};

use super::demo::handle;

/// How long each handler takes at least: the demo's own take no time, and nobody would see it move.
const PACE: Duration = Duration::from_millis(700);

/// Registers the template and says what the page's button submits.
pub async fn register(client: &Client) -> anyhow::Result<Example> {
    let checked = template::parse("order.yaml", TEMPLATE).map_err(|problems| anyhow::anyhow!("{problems:?}"))?;
    tx::in_tx(client.pool(), async |conn| templates::register(conn, &checked).await).await?;
    let inputs: Vec<Value> = serde_json::from_str(ORDERS)?;
    let template::Template { namespace, name, .. } = checked.template;
    Ok(Example { namespace, template: name, inputs })
}

/// A worker with the handlers of the example.
pub fn worker(url: &str) -> anyhow::Result<Worker> {
    let mut builder = Worker::builder(url).namespace("fulfillment");
    for name in handlers::NAMES {
        builder = builder.handler(name, move |ctx: StepContext, input: Value| async move {
            tokio::time::sleep(PACE).await;
            handle(name, &ctx, input)
        });
    }
    Ok(builder.build()?)
}
