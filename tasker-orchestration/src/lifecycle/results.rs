//! What `step_results` brings: hints that an attempt was reported.

use std::time::Duration;

use tasker_shared::message::Request;
use tasker_shared::queue::{Message, STEP_RESULTS};
use tracing::instrument;

use super::faults::quarantine;
use super::{Error, Hint, Shared, batch};

/// A settler whose results all wait with others looks again after this, at the latest.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Settles one batch of results.
#[instrument(level = "debug", skip_all, fields(messages = messages.len()))]
pub async fn settle_results(shared: &Shared, messages: Vec<Message>) -> Result<(), Error> {
    let (mut hints, mut bad) = (Vec::with_capacity(messages.len()), Vec::new());
    for message in messages {
        match message.body.as_ref().map_err(Clone::clone).and_then(Request::parse_result) {
            Ok(result) => hints.push(Hint::of(&message, result)),
            Err(reason) => bad.push((message.msg_id, reason)),
        }
    }
    if !bad.is_empty() {
        quarantine(shared, STEP_RESULTS, bad).await?;
    }
    let (mut entered, mut mine) = shared.busy.enter(hints);
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
