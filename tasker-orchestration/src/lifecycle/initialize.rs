//! Raw messages that create something: tasks, and signals for them. Operators' requests and the starts of
//! tasks that SQL created are events like others.

use serde_json::Value;
use sqlx::PgConnection;
use tasker_shared::store::tx::in_tx;
use tasker_shared::store::{signals, tasks};
use uuid::Uuid;

use super::locks::{self, Wait};
use super::queue::{self, QueueChanges, TASK_REQUESTS};
use super::{Error, Hint, Request, SendSignal, Shared};

/// Turns raw submits into tasks; one that cannot become a task is quarantined with its reason.
pub(super) async fn create(shared: &Shared, hints: &[&Hint], wait: Wait) -> Result<(), Error> {
    let submits: Vec<(i64, &Value)> = hints
        .iter()
        .filter_map(|hint| match &hint.request {
            Request::Submit(request) => Some((hint.message()?.0, request)),
            Request::Signal(_) | Request::Event(..) => None,
        })
        .collect();
    let created: Vec<Uuid> = in_tx(&shared.pool, async |conn| {
        if wait != Wait::Once {
            locks::wait_briefly(conn).await?;
        }
        let requests: Vec<&Value> = submits.iter().map(|(_, request)| *request).collect();
        let answers = tasks::submit(conn, &requests).await?;
        let (mut done, mut bad, mut created) = (Vec::new(), Vec::new(), Vec::new());
        for ((id, _), answer) in submits.iter().zip(answers) {
            if let Some(reason) = answer.error {
                bad.push((*id, reason));
            } else {
                done.push(*id);
                created.extend(answer.task_uuid.filter(|_| answer.is_new));
            }
        }
        conclude(conn, &done, &bad).await?;
        Ok::<_, Error>(created)
    })
    .await?;
    tracing::debug!(tasks = created.len(), "raw submits became tasks");
    Ok(())
}

/// Keeps signals that came as raw messages; one that is refused is quarantined with its reason.
pub(super) async fn keep_signals(shared: &Shared, hints: &[&Hint], wait: Wait) -> Result<(), Error> {
    in_tx(&shared.pool, async |conn| {
        if wait != Wait::Once {
            locks::wait_briefly(conn).await?;
        }
        let (mut done, mut bad) = (Vec::new(), Vec::new());
        for hint in hints {
            let (Request::Signal(signal), Some((id, _))) = (&hint.request, hint.message()) else {
                continue;
            };
            let SendSignal { task, name, payload, actor, traceparent } = signal;
            match &*signals::send(conn, *task, name, payload, Some(actor), traceparent.as_deref()).await? {
                "accepted" => done.push(id),
                refusal => bad.push((id, refusal.to_owned())),
            }
        }
        conclude(conn, &done, &bad).await
    })
    .await
}

/// Deletes the messages that are done, and quarantines the others.
async fn conclude(conn: &mut PgConnection, done: &[i64], bad: &[(i64, String)]) -> Result<(), Error> {
    if !bad.is_empty() {
        queue::quarantine(conn, TASK_REQUESTS, bad).await?;
    }
    Ok(queue::conclude(conn, &QueueChanges { queue: TASK_REQUESTS, done, ..QueueChanges::default() }).await?)
}
