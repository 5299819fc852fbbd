//! What `step_results` brings: hints that an attempt was reported.

use std::time::Duration;

use tasker_shared::message::ResultHint;
use tasker_shared::queue::{Message, STEP_RESULTS};
use tracing::instrument;

use super::batch::{self, Item};
use super::{Error, Hint, Look, Shared};

/// A settler whose results all wait with others looks again after this, at the latest.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Settles one batch of results.
#[instrument(level = "debug", skip_all, fields(messages = messages.len()))]
pub async fn settle_results(shared: &Shared, messages: Vec<Message>) -> Result<(), Error> {
    let (mut items, mut bad) = (Vec::with_capacity(messages.len()), Vec::new());
    for message in messages {
        match message.body.as_ref().map_err(Clone::clone).and_then(ResultHint::parse) {
            Ok(result) => {
                let look = Look::Result(result.step, result.attempt);
                let hint = Hint { task: result.task, look, msg_id: Some(message.msg_id), due_id: None };
                items.push(Item::Settle(hint, message));
            }
            Err(reason) => bad.push((message.msg_id, reason)),
        }
    }
    if !bad.is_empty() {
        batch::quarantine(shared, STEP_RESULTS, bad).await?;
    }
    let (mut entered, mut mine) = shared.busy.enter(items);
    if mine.is_empty() {
        // All of it waits with others: reading more would only make their next batch longer.
        let _ = tokio::time::timeout(LONGEST_WAIT, shared.busy.left()).await;
    }
    while !mine.is_empty() {
        batch::run(shared, STEP_RESULTS, mine).await?;
        mine = entered.next();
    }
    Ok(())
}
