//! Asks for tasks (a task is one run of a workflow) and waits for them.
//!
//! A thin layer over the public SQL functions: it checks an input before it is sent and adds the
//! current trace context. It never decides anything, and never writes a row of a task.

#![warn(clippy::missing_errors_doc)]

pub mod http;
mod operators;
pub mod wire;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgPool;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::time::Instant;
use uuid::Uuid;

use crate::payload;
use crate::state_machine::duration::LONGEST;
use crate::store::tx::{self, PoolOptions};
use crate::store::views::{self, AttemptView, StepView, TaskFilter, TaskView};
use crate::store::why::{self, Situation};
use crate::store::{self, listing, requests, tasks, transitions};
use crate::template::InputSchema;
use crate::trace::context::{BAGGAGE, TRACEPARENT, TRACESTATE, inject_current};
use crate::trace::log::TaskLog;

/// The channel on which settle names each task that ends, while somebody waits.
const FINISHED: &str = "tasker_finished";
/// A waiting row counts for 60 s.
const RENEW_EVERY: Duration = Duration::from_secs(20);
/// Notifications are hints: this is the guarantee.
const FIRST_POLL: Duration = Duration::from_millis(250);
const LONGEST_POLL: Duration = Duration::from_secs(5);

/// What a new task is made from. The fields that are not set take the template's or the database's default.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Submit {
    /// Who owns the template.
    pub namespace: String,
    /// The template's name.
    pub template: String,
    /// Its version; the one registered last if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A JSON object of at most 1 MiB (the database's setting).
    pub input: Value,
    /// What people will search by, 1 to 200 bytes; the task's uuid if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// Submitting it again returns the first task; 1 to 200 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// Higher runs first, from -9999 to 9999.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// Not before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_at: Option<DateTime<Utc>>,
    /// W3C trace context of the caller; the current OpenTelemetry context if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Goes with `traceparent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// W3C baggage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baggage: Option<String>,
}

impl Submit {
    /// A task of the template's latest version with this input.
    pub fn new(namespace: impl Into<String>, template: impl Into<String>, input: Value) -> Self {
        Self { namespace: namespace.into(), template: template.into(), input, ..Self::default() }
    }

    /// What would fail the statement that this is a part of, by its field.
    fn problem(&self) -> Option<String> {
        let texts = [
            ("namespace", Some(&self.namespace)),
            ("template", Some(&self.template)),
            ("version", self.version.as_ref()),
            ("correlation_id", self.correlation_id.as_ref()),
            ("idempotency_key", self.idempotency_key.as_ref()),
            ("traceparent", self.traceparent.as_ref()),
            ("tracestate", self.tracestate.as_ref()),
            ("baggage", self.baggage.as_ref()),
        ];
        let of_text = |(field, text): (_, Option<&String>)| Some((field, payload::text_problem(text?)?));
        let found = texts.into_iter().find_map(of_text);
        let found = found.or_else(|| payload::problem(&self.input).map(|why| ("input", why)));
        found.map(|(field, why)| format!("{field}: {why}"))
    }

    fn add_current_context(&mut self) {
        let mut headers = HashMap::new();
        inject_current(&mut headers);
        // A caller's own context is taken as a whole or not at all.
        if self.traceparent.is_none() {
            self.traceparent = headers.remove(TRACEPARENT);
            self.tracestate = headers.remove(TRACESTATE);
        }
        if self.baggage.is_none() {
            self.baggage = headers.remove(BAGGAGE);
        }
    }
}

/// A task that was accepted: it exists until retention removes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Submitted {
    /// The task.
    pub task_uuid: Uuid,
    /// False: the idempotency key was known, and this is the first task with it.
    pub is_new: bool,
}

/// A request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The database does not answer.
    #[error("the database cannot be reached: {0}")]
    Connect(#[source] sqlx::Error),
    /// The request names the field, what is wrong with it and what to do.
    #[error("{0}")]
    Refused(String),
    /// No task has this uuid.
    #[error("no task {0}")]
    NotFound(Uuid),
    /// The time to wait is over.
    #[error("{open} of {all} tasks have not ended within {waited:?}")]
    Timeout {
        /// Tasks that are still open.
        open: usize,
        /// Tasks that were waited for.
        all: usize,
        /// How long.
        waited: Duration,
    },
    /// The database, or a row that cannot be read.
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl From<sqlx::Error> for ClientError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// Submits and follows tasks. Cheap to clone; the clones share connections.
///
/// ```no_run
/// # async fn example() -> Result<(), tasker_shared::client::ClientError> {
/// use tasker_shared::client::{Client, Submit};
///
/// let tasker = Client::connect("postgresql:///shop").await?;
/// let order = Submit::new("shop", "order", serde_json::json!({"order_id": "4711"}));
/// let task = tasker.submit(order).await?;
/// println!("{}", tasker.wait(task, None).await?.status);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Client {
    pool: PgPool,
    /// Compiled input schemas by template id; a template never changes.
    schemas: Arc<Mutex<HashMap<i32, Option<Arc<InputSchema>>>>>,
}

impl Client {
    /// Opens connections of its own (4 at most); the schema must be migrated.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if the URL does not parse or the server does not answer in time.
    pub async fn connect(url: &str) -> Result<Self, ClientError> {
        let options = PoolOptions { max_connections: 4, application_name: "tasker-client", ..PoolOptions::default() };
        let pool = tx::pool(url, &options).await.map_err(ClientError::Connect)?;
        Ok(Self::from_pool(pool))
    }

    /// Uses the caller's connections. [`wait`](Self::wait) and [`watch`](Self::watch) open one of
    /// their own beside them, for as long as they last.
    pub fn from_pool(pool: PgPool) -> Self {
        Self { pool, schemas: Arc::default() }
    }

    /// The connections, for statements of the caller's own.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Submits one task.
    ///
    /// With an idempotency key that is known, the first task comes back.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says what is wrong with the request. After [`ClientError::Store`], the
    /// database's failure, the task may exist: with an idempotency key it is safe to ask again.
    pub async fn submit(&self, request: Submit) -> Result<Uuid, ClientError> {
        let mut answers = self.submit_many(vec![request]).await?;
        let answer = answers.pop().ok_or_else(|| ClientError::Refused("the database gave no answer".into()))?;
        answer.map(|submitted| submitted.task_uuid).map_err(ClientError::Refused)
    }

    /// Submits many tasks in one statement; one answer each, in order. A bad request costs only itself.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails. A request that is refused is the error of its own answer.
    pub async fn submit_many(&self, batch: Vec<Submit>) -> Result<Vec<Result<Submitted, String>>, ClientError> {
        let mut conn = self.pool.acquire().await?;
        let mut answers: Vec<Result<Submitted, String>> = Vec::with_capacity(batch.len());
        let (mut checked, mut indexes) = (Vec::new(), Vec::new());
        let mut known = HashMap::new();
        for (index, mut request) in batch.into_iter().enumerate() {
            if let Some(problem) = request.problem() {
                answers.push(Err(problem));
                continue;
            }
            let key = (request.namespace.clone(), request.template.clone(), request.version.clone());
            let schema = if let Some(schema) = known.get(&key) {
                Option::clone(schema)
            } else {
                let found = match self.schema(&mut conn, &request).await {
                    // The first question also tells whether the connection lives, so that the submit,
                    // which must not be repeated, needs no question of its own.
                    Err(ClientError::Store(error)) if tx::was_lost(&self.pool, &error) => {
                        conn.close_on_drop();
                        drop(conn);
                        conn = self.pool.acquire().await?;
                        self.schema(&mut conn, &request).await?
                    }
                    found => found?,
                };
                known.entry(key).or_insert(found).clone()
            };
            answers.push(Err("the database gave no answer".into()));
            match schema.as_deref().map_or(Ok(()), |schema| schema.check(&request.input)) {
                Ok(()) => {
                    request.add_current_context();
                    indexes.push(index);
                    checked.push(request);
                }
                Err(problems) => answers[index] = Err(problems.join("\n")),
            }
        }
        if checked.is_empty() {
            return Ok(answers);
        }
        for (index, row) in indexes.into_iter().zip(tasks::submit(&mut conn, &checked).await?) {
            answers[index] = match (row.task_uuid, row.error) {
                (Some(task_uuid), None) => Ok(Submitted { task_uuid, is_new: row.is_new }),
                (_, error) => Err(error.unwrap_or_else(|| "the database gave no task".into())),
            };
        }
        Ok(answers)
    }

    /// The schema that the input must satisfy; `None` if there is none, or if it does not compile
    /// here: then initialize says so.
    async fn schema(
        &self,
        conn: &mut sqlx::PgConnection,
        request: &Submit,
    ) -> Result<Option<Arc<InputSchema>>, ClientError> {
        let found =
            views::input_schema(conn, &request.namespace, &request.template, request.version.as_deref()).await?;
        let Some((template_id, schema)) = found else {
            return Ok(None);
        };
        let mut schemas = self.schemas.lock().unwrap_or_else(PoisonError::into_inner);
        let compile = || schema.as_ref().and_then(|schema| InputSchema::compile(schema).ok()).map(Arc::new);
        Ok(schemas.entry(template_id).or_insert_with(compile).clone())
    }

    /// The task as it is now.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Store`] if the database fails.
    pub async fn get(&self, task: Uuid) -> Result<TaskView, ClientError> {
        let found = views::these(&mut *self.pool.acquire().await?, &[task]).await?.pop();
        found.ok_or(ClientError::NotFound(task))
    }

    /// The latest tasks that match, newest first.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn list(&self, filter: &TaskFilter) -> Result<Vec<TaskView>, ClientError> {
        Ok(listing::latest(&mut *self.pool.acquire().await?, filter).await?)
    }

    /// The task's steps in template order.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn steps(&self, task: Uuid) -> Result<Vec<StepView>, ClientError> {
        Ok(views::steps(&mut *self.pool.acquire().await?, task).await?)
    }

    /// Every attempt of these tasks.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn attempts(&self, tasks: &[Uuid]) -> Result<Vec<AttemptView>, ClientError> {
        Ok(views::attempts(&mut *self.pool.acquire().await?, tasks).await?)
    }

    /// What the task came to: the outputs of its last steps, by step name.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn result(&self, task: Uuid) -> Result<BTreeMap<String, Value>, ClientError> {
        Ok(views::results(&mut *self.pool.acquire().await?, &[task]).await?.remove(&task).unwrap_or_default())
    }

    /// What the task waits for; [`Situation::sentence`] says it in one sentence.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Store`] if the database fails.
    pub async fn why(&self, task: Uuid) -> Result<Situation, ClientError> {
        why::situation(&mut *self.pool.acquire().await?, task).await?.ok_or(ClientError::NotFound(task))
    }

    /// The committed log of the task, which its trace is a function of, and the database's time after it was read.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such task, [`ClientError::Store`] if the database fails.
    pub async fn log(&self, task: Uuid) -> Result<(TaskLog, DateTime<Utc>), ClientError> {
        let mut conn = self.pool.acquire().await?;
        let log = transitions::logs(&mut conn, &[task]).await?.pop().ok_or(ClientError::NotFound(task))?;
        Ok((log, views::now(&mut conn).await?))
    }

    /// Waits until the task has ended, in whatever way.
    ///
    /// # Errors
    /// As [`wait_many`](Self::wait_many).
    pub async fn wait(&self, task: Uuid, timeout: Option<Duration>) -> Result<TaskView, ClientError> {
        self.wait_many(&[task], timeout, |_| {}).await?.pop().ok_or(ClientError::NotFound(task))
    }

    /// Waits until all of the tasks have ended, and calls `on_end` as each does. The answer has
    /// the order of `tasks`.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if one of the tasks does not exist, [`ClientError::Timeout`] if one has not ended in
    /// time, [`ClientError::Store`] if the database fails.
    pub async fn wait_many(
        &self,
        tasks: &[Uuid],
        timeout: Option<Duration>,
        mut on_end: impl FnMut(Uuid),
    ) -> Result<Vec<TaskView>, ClientError> {
        let existing: HashSet<Uuid> =
            tasks::existing(&mut *self.pool.acquire().await?, tasks).await?.into_iter().collect();
        if let Some(&unknown) = tasks.iter().find(|task| !existing.contains(task)) {
            return Err(ClientError::NotFound(unknown));
        }
        let mut open = existing;
        let waited_for = open.len();
        let began = Instant::now();
        let end = timeout.map(|timeout| began + timeout.min(LONGEST));
        let mut watch = self.watch().await?;
        let mut poll = FIRST_POLL;
        let mut poll_at = began;
        while !open.is_empty() {
            if end.is_some_and(|end| Instant::now() >= end) {
                return Err(ClientError::Timeout { open: open.len(), all: waited_for, waited: began.elapsed() });
            }
            if Instant::now() >= poll_at {
                let ids: Vec<Uuid> = open.iter().copied().collect();
                for task in views::finished(&mut *self.pool.acquire().await?, &ids).await? {
                    open.remove(&task);
                    on_end(task);
                }
                poll_at = Instant::now() + poll;
                poll = (poll * 2).min(LONGEST_POLL);
                continue;
            }
            let until = end.map_or(poll_at, |end| end.min(poll_at));
            match tokio::time::timeout_at(until, watch.next()).await {
                Ok(Ok(task)) if open.remove(&task) => on_end(task),
                // A hint less: the poll goes on, and says so if the database is gone.
                Ok(Err(_)) => tokio::time::sleep_until(until).await,
                Ok(Ok(_)) | Err(_) => {}
            }
        }
        watch.end().await;
        let mut ended: HashMap<Uuid, TaskView> = HashMap::new();
        for task in views::these(&mut *self.pool.acquire().await?, tasks).await? {
            ended.insert(task.task_uuid, task);
        }
        Ok(tasks.iter().filter_map(|task| ended.get(task).cloned()).collect())
    }

    /// Hears of every task that ends from now on. A hint: a lost connection loses what ended meanwhile.
    ///
    /// # Errors
    /// [`ClientError::Store`] if the database fails.
    pub async fn watch(&self) -> Result<Watch, ClientError> {
        let reader = format!("client/{}", Uuid::new_v4());
        requests::await_finished(&mut *self.pool.acquire().await?, &reader).await?;
        // One of the pool would be kept from others for the whole time, also from this wait itself.
        let own = PgPoolOptions::new().max_connections(1);
        let own = own.connect_lazy_with(self.pool.connect_options().as_ref().clone());
        let mut listener = PgListener::connect_with(&own).await?;
        listener.listen(FINISHED).await?;
        Ok(Watch { pool: self.pool.clone(), listener, reader, renew_at: Instant::now() + RENEW_EVERY })
    }
}

fn granted(answer: String) -> Result<(), ClientError> {
    if answer == "accepted" { Ok(()) } else { Err(ClientError::Refused(answer)) }
}

fn accepted(task: Uuid, answer: String) -> Result<(), ClientError> {
    match answer.as_str() {
        "accepted" => Ok(()),
        "no such task" => Err(ClientError::NotFound(task)),
        _ => Err(ClientError::Refused(answer)),
    }
}

fn schedule_accepted(answer: String) -> Result<(), ClientError> {
    if answer == "accepted" { Ok(()) } else { Err(ClientError::Refused(answer)) }
}

/// What a function of ours refused with words for the caller (SQLSTATE 22023, 42501).
fn refused(error: store::Error) -> ClientError {
    match &error {
        store::Error::Database(sqlx::Error::Database(answer))
            if answer.code().is_some_and(|code| code == "22023" || code == "42501") =>
        {
            ClientError::Refused(answer.message().to_owned())
        }
        _ => error.into(),
    }
}

/// Hears of tasks that end.
#[derive(Debug)]
pub struct Watch {
    pool: PgPool,
    listener: PgListener,
    reader: String,
    renew_at: Instant,
}

impl Watch {
    /// The next task that ended. May be dropped at any time without losing one.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if the connection breaks off and does not come back.
    pub async fn next(&mut self) -> Result<Uuid, ClientError> {
        loop {
            tokio::select! {
                notification = self.listener.recv() => {
                    let notification = notification.map_err(ClientError::Connect)?;
                    if let Ok(task) = notification.payload().parse() {
                        return Ok(task);
                    }
                }
                () = tokio::time::sleep_until(self.renew_at) => {
                    self.renew_at = Instant::now() + RENEW_EVERY;
                    if let Ok(mut conn) = self.pool.acquire().await
                        && let Err(error) = requests::await_finished(&mut conn, &self.reader).await
                    {
                        tracing::debug!(%error, "the subscription to finished tasks was not renewed; polling goes on");
                    }
                }
            }
        }
    }

    /// Stops listening and says so; merely dropped, it counts for up to 60 s more.
    pub async fn end(self) {
        drop(self.listener);
        if let Ok(mut conn) = self.pool.acquire().await {
            let _ = requests::unregister(&mut conn, &self.reader).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sqlx::Connection as _;

    use super::*;
    use crate::store::templates;
    use crate::template;
    use tasker_testing::TestDatabase;

    const TEMPLATE: &str = r#"
namespace: shop
name: order
version: "1"
input_schema: {type: object, required: [order_id]}
steps: [{name: only, handler: noop}]
"#;

    async fn client(database: &TestDatabase) -> Client {
        let client = Client::connect(&database.url()).await.unwrap();
        let checked = template::parse("order.yaml", TEMPLATE).unwrap();
        let mut conn = client.pool.acquire().await.unwrap();
        templates::register(&mut conn, &checked).await.unwrap();
        client
    }

    fn order(id: &str) -> Submit {
        Submit::new("shop", "order", json!({"order_id": id}))
    }

    #[tokio::test]
    async fn one_bad_request_costs_only_itself() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let requests = vec![
            order("1"),
            Submit::new("shop", "order", json!({})),
            Submit::new("shop", "nothing", json!({})),
            order("2"),
            order("a\0b"),
            Submit { correlation_id: Some("\0".into()), ..order("3") },
            Submit::new("sh\0p", "order", json!({})),
        ];
        let answers = client.submit_many(requests).await.unwrap();
        assert!(answers[0].as_ref().is_ok_and(|submitted| submitted.is_new), "{answers:?}");
        assert!(answers[1].as_ref().is_err_and(|problem| problem.contains("order_id")), "{answers:?}");
        assert!(
            answers[2].as_ref().is_err_and(|problem| problem.starts_with("template: no template nothing")),
            "{answers:?}"
        );
        assert_ne!(answers[0], answers[3]);
        for (answer, field) in answers[4..].iter().zip(["input", "correlation_id", "namespace"]) {
            let expected = format!("{field}: holds the character U+0000");
            assert!(answer.as_ref().is_err_and(|problem| problem.starts_with(&expected)), "{answers:?}");
        }
        assert_eq!(client.list(&TaskFilter::default()).await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn the_same_idempotency_key_brings_the_first_task_back() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let keyed = |id| Submit { idempotency_key: Some("k".into()), ..order(id) };
        let first = client.submit(keyed("1")).await.unwrap();
        assert_eq!(client.submit(keyed("1")).await.unwrap(), first);
        let conflict = client.submit(keyed("2")).await.unwrap_err();
        assert!(matches!(&conflict, ClientError::Refused(why) if why.starts_with("idempotency_key:")), "{conflict}");
    }

    #[tokio::test]
    async fn a_time_that_no_calendar_has_is_refused() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        for time in ["infinity", "-infinity", "20000-01-01", "soon"] {
            let mut order = serde_json::to_value(order("1")).unwrap();
            order["run_at"] = json!(time);
            let mut conn = client.pool.acquire().await.unwrap();
            let answers = tasks::submit(&mut conn, &[order]).await.unwrap();
            let problem = answers[0].error.as_deref();
            assert!(
                problem.is_some_and(|problem| problem.starts_with("run_at: must be a time")),
                "{time}: {problem:?}"
            );
        }
        let set = "select tasker.set_schedule('shop', 'late', 'order', once_at => 'infinity')";
        let refused = sqlx::query(set).execute(client.pool()).await.unwrap_err();
        assert!(refused.to_string().contains("once_at: must be before the year 10000"), "{refused}");
    }

    #[tokio::test]
    async fn a_callers_trace_is_continued() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let task = client.submit(Submit { traceparent: Some(traceparent.into()), ..order("1") }).await.unwrap();
        assert_eq!(client.get(task).await.unwrap().trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
    }

    #[tokio::test]
    async fn a_task_is_filtered_by_what_people_see() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let task = client.submit(Submit { correlation_id: Some("ORD-1".into()), ..order("1") }).await.unwrap();
        client.submit(order("2")).await.unwrap();
        let found = async |filter: TaskFilter| {
            client.list(&filter).await.unwrap().iter().map(|task| task.task_uuid).collect::<Vec<_>>()
        };
        assert_eq!(found(TaskFilter { correlation_id: Some("ORD-1".into()), ..TaskFilter::default() }).await, [task]);
        assert_eq!(found(TaskFilter { status: Some("queued".into()), ..TaskFilter::default() }).await.len(), 2);
        assert_eq!(found(TaskFilter { status: Some("failed".into()), ..TaskFilter::default() }).await.len(), 0);
        assert_eq!(found(TaskFilter { namespace: Some("other".into()), ..TaskFilter::default() }).await.len(), 0);
        assert_eq!(found(TaskFilter { limit: 1, ..TaskFilter::default() }).await.len(), 1);
    }

    /// Ends a task as settle does: the row, and a word to whoever waits.
    async fn end(client: &Client, task: Uuid) {
        sqlx::query("update tasker.tasks set state = 'complete', finished_at = clock_timestamp() where task_uuid = $1")
            .bind(task)
            .execute(client.pool())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn waiting_ends_with_the_task_and_not_before() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let tasks = [client.submit(order("1")).await.unwrap(), client.submit(order("2")).await.unwrap()];
        let early = client.wait(tasks[0], Some(Duration::ZERO)).await.unwrap_err();
        assert!(matches!(early, ClientError::Timeout { open: 1, all: 1, .. }), "{early}");

        end(&client, tasks[0]).await;
        let (heard, mut ends) = tokio::sync::mpsc::unbounded_channel();
        // Longer than any clock goes.
        let waiting = client.wait_many(&tasks, Some(Duration::MAX), |task| heard.send(task).unwrap());
        let finish = async {
            assert_eq!(ends.recv().await, Some(tasks[0]));
            end(&client, tasks[1]).await;
        };
        let (ended, ()) = tokio::join!(waiting, finish);
        let ended: Vec<Uuid> = ended.unwrap().iter().map(|task| task.task_uuid).collect();
        assert_eq!(ended, tasks, "in the order asked for");
        assert_eq!(ends.recv().await, Some(tasks[1]));
    }

    #[tokio::test]
    async fn more_may_wait_at_once_than_there_are_connections() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let mut tasks = Vec::new();
        for n in 0..6 {
            tasks.push(client.submit(order(&n.to_string())).await.unwrap());
        }
        let waits = tasks.iter().map(|task| client.wait(*task, Some(Duration::from_secs(30))));
        let finish = async {
            // All of them wait.
            let mut conn = sqlx::PgConnection::connect(&database.url()).await.unwrap();
            let waiting = "select count(*) from tasker.readers where queue = 'finished'";
            while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut conn).await.unwrap() < 6 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let end = "update tasker.tasks set state = 'complete', finished_at = clock_timestamp()";
            sqlx::query(end).execute(&mut conn).await.unwrap();
        };
        let (ended, ()) = tokio::join!(futures_util::future::join_all(waits), finish);
        for ended in ended {
            assert!(ended.unwrap().is_finished());
        }
    }

    #[tokio::test]
    async fn a_watch_is_announced_hears_and_is_taken_back() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let readers = async || {
            let count: i64 = sqlx::query_scalar("select count(*) from tasker.readers where queue = 'finished'")
                .fetch_one(client.pool())
                .await
                .unwrap();
            count
        };
        let mut watch = client.watch().await.unwrap();
        assert_eq!(readers().await, 1);
        let task = Uuid::new_v4();
        sqlx::query("select pg_notify('tasker_finished', $1::text)").bind(task).execute(client.pool()).await.unwrap();
        assert_eq!(watch.next().await.unwrap(), task);
        watch.end().await;
        assert_eq!(readers().await, 0);
    }

    #[tokio::test]
    async fn requests_about_unknown_or_ended_tasks_are_refused() {
        let database = TestDatabase::fresh().await;
        let client = client(&database).await;
        let unknown = Uuid::new_v4();
        assert!(
            matches!(client.cancel(unknown, None, None).await, Err(ClientError::NotFound(task)) if task == unknown)
        );
        assert!(matches!(client.wait(unknown, None).await, Err(ClientError::NotFound(task)) if task == unknown));
        let task = client.submit(order("1")).await.unwrap();
        client.cancel(task, Some("ada"), Some("changed my mind")).await.unwrap();
        assert!(
            matches!(client.retry(task, None, None).await, Err(ClientError::Refused(why)) if why.contains("is queued"))
        );
        end(&client, task).await;
        assert!(
            matches!(client.terminate(task, None, None).await, Err(ClientError::Refused(why)) if why.contains("already ended"))
        );
    }
}
