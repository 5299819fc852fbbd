//! Accepts what `task_requests` asks for: creates tasks from raw submits, begins those that
//! SQL created, and passes operators' wishes to the settle.

use serde_json::Value;
use tasker_shared::message::{Request, SendSignal};
use tasker_shared::queue::{self, Message, Outbox, TASK_REQUESTS, Traffic};
use tasker_shared::store::locks;
use tasker_shared::store::tasks;
use tasker_shared::store::tx::in_tx;
use tasker_shared::store::waits;
use tracing::instrument;
use uuid::Uuid;

use super::batch::{self, Item};
use super::locks::Wait;
use super::{Act, Error, Hint, Look, Shared};

/// Deals with one batch of requests.
#[instrument(level = "debug", skip_all, fields(messages = messages.len()))]
pub async fn initialize(shared: &Shared, messages: Vec<Message>) -> Result<(), Error> {
    let (mut settles, mut submits, mut signals, mut bad) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for message in messages {
        let request =
            message.body.as_ref().map_err(Clone::clone).and_then(|body| Request::parse(body, message.headers.as_ref()));
        let (task, look) = match request {
            Ok(Request::Submit(request)) => {
                submits.push(Item::Submit(request, message));
                continue;
            }
            Ok(Request::Start(task)) => (task, Look::Start),
            Ok(Request::Cancel(task, operator)) => (task, Look::Cancel(operator)),
            Ok(Request::Terminate(task, operator)) => (task, Look::Terminate(operator)),
            Ok(Request::Retry(task, operator, only)) => (task, Look::Operate(operator, Act::Retry(only))),
            Ok(Request::Rerun(task, operator, from)) => (task, Look::Operate(operator, Act::Rerun(from))),
            Ok(Request::Suspend(task, operator)) => (task, Look::Suspend(operator)),
            Ok(Request::Resume(task, operator)) => (task, Look::Operate(operator, Act::Resume)),
            Ok(Request::GiveUp(task, operator)) => (task, Look::GiveUp(operator)),
            Ok(Request::ResolveTask(task, operator)) => (task, Look::ResolveTask(operator)),
            Ok(Request::ByHand(task, operator, step, act, output)) => {
                (task, Look::Operate(operator, Act::ByHand(step, act, output)))
            }
            Ok(Request::Signal(task)) => (task, Look::Signal),
            Ok(Request::Child(task, step, attempt)) => (task, Look::Child(step, attempt)),
            Ok(Request::SendSignal(signal)) => {
                signals.push(Item::Signal(signal, message));
                continue;
            }
            Err(reason) => {
                bad.push((message.msg_id, reason));
                continue;
            }
        };
        settles.push(Item::Settle(Hint { task, look, msg_id: Some(message.msg_id), due_id: None }, message));
    }
    if !bad.is_empty() {
        batch::quarantine(shared, TASK_REQUESTS, bad).await?;
    }
    batch::run(shared, TASK_REQUESTS, submits).await?;
    batch::run(shared, TASK_REQUESTS, signals).await?;
    batch::run(shared, TASK_REQUESTS, settles).await?;
    Ok(())
}

/// Turns raw submits into tasks; one that cannot become a task is quarantined with its reason.
pub(super) async fn create(shared: &Shared, items: &[&Item], wait: Wait) -> Result<(), Error> {
    let submits: Vec<(&Message, &Value)> = items
        .iter()
        .filter_map(|item| match item {
            Item::Submit(request, message) => Some((message, request)),
            Item::Settle(..) | Item::Due(..) | Item::Signal(..) => None,
        })
        .collect();
    let created: Vec<Uuid> = in_tx(&shared.pool, async |conn| {
        if wait != Wait::Once {
            locks::wait_briefly(conn).await?;
        }
        let requests: Vec<&Value> = submits.iter().map(|(_, request)| *request).collect();
        let answers = tasks::submit(conn, &requests).await?;
        let (mut done, mut bad, mut created) = (Vec::new(), Vec::new(), Vec::new());
        for ((message, _), answer) in submits.iter().zip(answers) {
            if let Some(reason) = answer.error {
                bad.push((message.msg_id, reason));
            } else {
                done.push(message.msg_id);
                created.extend(answer.task_uuid.filter(|_| answer.is_new));
            }
        }
        if !bad.is_empty() {
            queue::quarantine(conn, TASK_REQUESTS, &bad).await?;
        }
        let outbox = Outbox::default();
        queue::conclude(conn, &Traffic { queue: TASK_REQUESTS, done: &done, due: &[], outbox }).await?;
        Ok::<_, Error>(created)
    })
    .await?;
    tracing::debug!(tasks = created.len(), "raw submits became tasks");
    Ok(())
}

/// Keeps signals that came as raw messages; one that is refused is quarantined with its reason.
pub(super) async fn keep_signals(shared: &Shared, items: &[&Item], wait: Wait) -> Result<(), Error> {
    in_tx(&shared.pool, async |conn| {
        if wait != Wait::Once {
            locks::wait_briefly(conn).await?;
        }
        let (mut done, mut bad) = (Vec::new(), Vec::new());
        for item in items {
            let Item::Signal(signal, message) = item else {
                continue;
            };
            let SendSignal { task, name, payload, actor, traceparent } = signal;
            match &*waits::signal(conn, *task, name, payload, Some(actor), traceparent.as_deref()).await? {
                "accepted" => done.push(message.msg_id),
                refusal => bad.push((message.msg_id, refusal.to_owned())),
            }
        }
        if !bad.is_empty() {
            queue::quarantine(conn, TASK_REQUESTS, &bad).await?;
        }
        let outbox = Outbox::default();
        queue::conclude(conn, &Traffic { queue: TASK_REQUESTS, done: &done, due: &[], outbox }).await?;
        Ok::<_, Error>(())
    })
    .await
}
