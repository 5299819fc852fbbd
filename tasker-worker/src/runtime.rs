//! A worker from its first hello to the end of its drain: which loops run, on
//! which connections, and in which order they stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgListener;
use sqlx::{PgConnection, PgPool, Postgres};
use tasker_shared::metrics::{Listen, Scrape, serve};
use tasker_shared::state_machine::retry::LONGEST;
use tasker_shared::store::protocol::{self, Hello};
use tasker_shared::store::redaction;
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_shared::store::{Error as StoreError, HOT_PATH_SETTINGS};
use tasker_shared::telemetry;
use tasker_shared::trace::config::{Sources, Stored, TraceConfig};
use tasker_shared::trace::settings::{Applying, Follower};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::claim::Claimer;
use crate::context::{Capture, StepContext};
use crate::executor::Executor;
use crate::handler::{StepError, Typed};
use crate::handlers::{self, Http};
use crate::held::{self, Held};
use crate::measure::Numbers;
use crate::registry::Registry;
use crate::report::{REPORTERS, Reporter, Results};

const CHANNEL: &str = "tasker";
const HELLO_EVERY: Duration = Duration::from_secs(10);
/// Results get at least this long to reach the database when the drain's time is up.
const LAST_REPORTS: Duration = Duration::from_secs(2);
/// Connections for handlers that ask for outputs of other steps.
const OUTPUT_CONNECTIONS: u32 = 4;

/// A worker cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that no template can have either.
    #[error(
        "{what}: {name:?} is not a name; use lower-case letters, digits and single underscores, beginning with a letter, 40 bytes at most"
    )]
    Name {
        /// namespace or queue.
        what: &'static str,
        /// What was given.
        name: String,
    },
    /// Nothing to offer.
    #[error("handlers: there is none; add one with .handler(name, function) or .builtins()")]
    NoHandlers,
    /// One name, two functions.
    #[error("handlers: {0:?} is there twice; give each handler a name of its own")]
    DuplicateHandler(String),
    /// No room to run anything.
    #[error("slots: must be from 1 to 100000")]
    Slots,
    /// The database was not reached at the start.
    #[error("the database: {0}")]
    Connect(#[from] sqlx::Error),
    /// The file that `TASKER_REDACTION_FILE` names.
    #[error(transparent)]
    Redaction(#[from] tasker_shared::redact::Error),
    /// The listener of metrics.
    #[error("metrics_listen: {0}; give another address, or none")]
    Metrics(std::io::Error),
    /// A loop of the worker panicked.
    #[error("the worker stopped: {0}; this is a defect of Tasker")]
    Stopped(String),
}

/// Says what a worker offers. Made by [`Worker::builder`].
pub struct Builder {
    url: String,
    namespace: String,
    queues: Vec<Option<String>>,
    registry: Registry,
    builtins: bool,
    http_hosts: Vec<String>,
    slots: usize,
    lease: Duration,
    drain_timeout: Duration,
    cancel_grace: Duration,
    name: Option<String>,
    version: String,
    metrics: Option<Listen>,
    capture: Capture,
    trace_settings: Option<Sources>,
}

impl Builder {
    /// The namespace whose steps it runs; `default` if not given.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// A queue that it reads: `None` is the namespace's own, `Some("slow")` the one of steps
    /// with `queue: slow`. May be called again for more; without a call it reads `None`.
    #[must_use]
    pub fn queue(mut self, queue: Option<&str>) -> Self {
        let queue = queue.map(str::to_owned);
        if !self.queues.contains(&queue) {
            self.queues.push(queue);
        }
        self
    }

    /// A handler by the name that templates use. Steps of handlers that no worker offers stay
    /// in their queue.
    #[must_use]
    pub fn handler<F, Fut, I, O, E>(mut self, name: impl Into<String>, function: F) -> Self
    where
        F: Fn(StepContext, I) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, E>> + Send + 'static,
        I: DeserializeOwned + 'static,
        O: Serialize + 'static,
        E: Into<StepError> + 'static,
    {
        self.registry.insert(name.into(), Typed::new(function));
        self
    }

    /// The handlers of [`handlers`](crate::handlers): `noop`, `echo`, `sleep`, `fail` and `http`.
    #[must_use]
    pub fn builtins(mut self) -> Self {
        self.builtins = true;
        self
    }

    /// Hosts that the built-in `http` handler may talk to, as `host` (ports 80 and 443) or
    /// `host:port`. Nothing is allowed otherwise.
    #[must_use]
    pub fn allow_http_hosts(mut self, hosts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.http_hosts.extend(hosts.into_iter().map(Into::into));
        self
    }

    /// Attempts that run at once; 50 if not given. A claim never takes more than there are
    /// free slots, so many slots suit many short steps.
    #[must_use]
    pub fn slots(mut self, slots: usize) -> Self {
        self.slots = slots;
        self
    }

    /// The lease of steps whose template gives none; 10 s if not given.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long running handlers may take to finish after the shutdown token fired; 30 s if not given.
    #[must_use]
    pub fn drain_timeout(mut self, drain_timeout: Duration) -> Self {
        self.drain_timeout = drain_timeout;
        self
    }

    /// How long a handler may run on after its cancellation token fired; 10 s if not given.
    #[must_use]
    pub fn cancel_grace(mut self, cancel_grace: Duration) -> Self {
        self.cancel_grace = cancel_grace;
        self
    }

    /// Unique among all workers; `<host>-<pid>-<4 hex digits>` if not given.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The version of the program, shown on its spans; that of this crate if not given.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// Serves the process's metrics there, at `/metrics`: `9464` on this machine only, or
    /// `0.0.0.0:9464`. Not served if not given.
    #[must_use]
    pub fn metrics_listen(mut self, listen: Listen) -> Self {
        self.metrics = Some(listen);
        self
    }

    /// Keeps inputs or outputs of handlers with their attempts: redacted, and cut at 4 KiB. Not if not given.
    #[must_use]
    pub fn capture(mut self, capture: Capture) -> Self {
        self.capture = capture;
        self
    }

    /// Lets this process follow the trace settings that are stored in the database; see
    /// `tasker_shared::telemetry::start`. Without it the spans of handlers go where
    /// `telemetry::init` was told.
    #[must_use]
    pub fn trace_settings(mut self, sources: Sources) -> Self {
        self.trace_settings = Some(sources);
        self
    }

    /// Checks what was given. Talks to nobody.
    pub fn build(mut self) -> Result<Worker, Error> {
        check_name("namespace", &self.namespace)?;
        for queue in self.queues.iter().flatten() {
            check_name("queue", queue)?;
        }
        if self.queues.is_empty() {
            self.queues.push(None);
        }
        if !(1..=100_000).contains(&self.slots) {
            return Err(Error::Slots);
        }
        if self.builtins {
            self.registry.insert("noop".into(), Typed::new(handlers::noop));
            self.registry.insert("echo".into(), Typed::new(handlers::echo));
            self.registry.insert("sleep".into(), Typed::new(handlers::sleep));
            self.registry.insert("fail".into(), Typed::new(handlers::fail));
            let http = Http::new(self.http_hosts);
            self.registry.insert("http".into(), Typed::new(move |ctx, request| http.clone().call(ctx, request)));
        }
        if let Some(name) = self.registry.duplicate {
            return Err(Error::DuplicateHandler(name));
        }
        if self.registry.names().is_empty() {
            return Err(Error::NoHandlers);
        }
        Ok(Worker {
            url: self.url,
            namespace: self.namespace,
            queues: self.queues,
            registry: self.registry,
            slots: self.slots,
            lease: self.lease,
            drain_timeout: self.drain_timeout,
            cancel_grace: self.cancel_grace,
            name: self.name.unwrap_or_else(default_name),
            version: self.version,
            metrics: self.metrics,
            capture: self.capture,
            trace_settings: self.trace_settings,
        })
    }
}

/// Claims steps and runs their handlers.
pub struct Worker {
    url: String,
    namespace: String,
    queues: Vec<Option<String>>,
    registry: Registry,
    slots: usize,
    lease: Duration,
    drain_timeout: Duration,
    cancel_grace: Duration,
    name: String,
    version: String,
    metrics: Option<Listen>,
    capture: Capture,
    trace_settings: Option<Sources>,
}

impl Worker {
    /// A worker for the database at this URL. It opens connections of its own, because claims
    /// and reports need different session settings.
    pub fn builder(url: impl Into<String>) -> Builder {
        Builder {
            url: url.into(),
            namespace: "default".into(),
            queues: Vec::new(),
            registry: Registry::default(),
            builtins: false,
            http_hosts: Vec::new(),
            slots: 50,
            lease: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(30),
            cancel_grace: Duration::from_secs(10),
            name: None,
            version: env!("CARGO_PKG_VERSION").into(),
            metrics: None,
            capture: Capture::default(),
            trace_settings: None,
        }
    }

    /// Its name: `claimed_by` of steps, `worker` of attempts and spans.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Works until `shutdown` fires, then drains: claims nothing more, lets running handlers
    /// finish for `drain_timeout`, reports everything, and returns. Handlers that still run
    /// then are dropped, as all are if this future is, and other workers get their steps when
    /// the leases expire.
    ///
    /// Errors if the database is not reached at the start; later it may come and go.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let _metrics = match self.metrics {
            // A worker's role may read no table: what the database knows, orchestrators tell.
            Some(listen) => Some(serve(listen, Scrape::new(None)).await.map_err(Error::Metrics)?),
            None => None,
        };
        let pools = Pools::open(&self.url, self.queues.len()).await?;
        // What handlers say is redacted before it leaves this process.
        redaction::load(&pools.reports).await?;
        let mut running = self.start(&pools, shutdown.child_token());
        let ended = running.until_stopped().await;
        running.drain().await;
        pools.close().await;
        ended
    }

    fn start(self, pools: &Pools, stop: CancellationToken) -> Running {
        let queues: Vec<String> =
            self.queues.iter().map(|queue| physical_queue(&self.namespace, queue.as_deref())).collect();
        let wakes: Vec<Arc<Notify>> = queues.iter().map(|_| Arc::default()).collect();
        let handlers = self.registry.names();
        let (results, inbox) = Results::new();
        let held = Arc::new(Held::default());
        let namespace: Arc<str> = self.namespace.as_str().into();
        let executor = Arc::new(Executor {
            registry: self.registry,
            namespace: Arc::clone(&namespace),
            held: Arc::clone(&held),
            results,
            pool: pools.claims.clone(),
            cancel_grace: self.cancel_grace,
            numbers: Numbers::new(namespace, self.slots),
            capture: self.capture,
        });
        let trace_changed: Arc<Notify> = Arc::default();
        let follower = self.trace_settings.map(|sources| Follower {
            pool: pools.reports.clone(),
            kind: "worker",
            name: self.name.clone(),
            version: self.version.clone(),
            now: sources.resolve(&Stored::new()).unwrap_or_default(),
            sources: Some(sources),
            wake: Arc::clone(&trace_changed),
        });
        let presence = Arc::new(Presence {
            trace_changed,
            worker: self.name.clone(),
            namespace: self.namespace,
            version: self.version,
            slots: i32::try_from(self.slots).unwrap_or(i32::MAX),
            lock_key: rand::random(),
            handlers: handlers.clone(),
            queues,
            wakes: wakes.clone(),
            held: Arc::clone(&held),
            locked: AtomicBool::new(false),
            changed: Notify::new(),
            known: CancellationToken::new(),
        });
        let (all_ran, all_reported, give_up) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let attempts = TaskTracker::new();

        let mut intake = JoinSet::new();
        intake.spawn(Arc::clone(&presence).say_hello(pools.reports.clone(), stop.clone()));
        let slots = Arc::new(Semaphore::new(self.slots));
        for (queue, wake) in self.queues.into_iter().zip(wakes) {
            let claimer = Claimer {
                executor: Arc::clone(&executor),
                worker: self.name.clone(),
                queue,
                handlers: handlers.clone(),
                lease: self.lease,
                slots: Arc::clone(&slots),
                slot_count: self.slots,
                attempts: attempts.clone(),
                wake,
            };
            let (pool, stop, known) = (pools.claims.clone(), stop.clone(), presence.known.clone());
            intake.spawn(async move {
                // A claim notes the worker's version and whether it sleeps, so hello comes first.
                if stop.run_until_cancelled(known.cancelled()).await.is_some() {
                    claimer.run(pool, stop).await;
                }
            });
        }
        let mut upkeep = JoinSet::new();
        upkeep.spawn(presence.listen(pools.session.clone(), all_reported.clone()));
        if let Some(follower) = follower {
            upkeep.spawn(follow_settings(follower, all_reported.clone()));
        }
        upkeep.spawn(held::beat(held, pools.claims.clone(), self.lease, all_reported.clone()));
        let mut reporters = JoinSet::new();
        for _ in 0..REPORTERS {
            let reporter = Reporter {
                inbox: Arc::clone(&inbox),
                executor: Arc::clone(&executor),
                all_ran: all_ran.clone(),
                give_up: give_up.clone(),
            };
            reporters.spawn(reporter.run(pools.reports.clone()));
        }
        tracing::info!(worker = self.name, namespace = &*executor.namespace, slots = self.slots, "the worker runs");
        Running {
            worker: self.name,
            executor,
            attempts,
            intake,
            reporters,
            upkeep,
            stop,
            all_ran,
            give_up,
            all_reported,
            drain_timeout: self.drain_timeout,
        }
    }
}

/// The connections of a worker.
struct Pools {
    /// Of claims and heartbeats: these may be lost in a crash of the database, for they are
    /// repeated. And of `parent_output`, which writes nothing.
    claims: PgPool,
    /// Of reports and hellos: a lost report would be lost work.
    reports: PgPool,
    /// The session that listens and holds the lock.
    session: PgPool,
}

impl Pools {
    async fn open(url: &str, queues: usize) -> Result<Self, sqlx::Error> {
        let pool = async |max_connections, settings: &[(&str, &str)]| {
            let options =
                PoolOptions { max_connections, application_name: "tasker-worker", settings, ..PoolOptions::default() };
            tx::pool(url, &options).await
        };
        let mut asynchronous = HOT_PATH_SETTINGS.to_vec();
        asynchronous.push(("synchronous_commit", "off"));
        let queues = u32::try_from(queues).unwrap_or(u32::MAX);
        Ok(Self {
            claims: pool(queues.saturating_add(1 + OUTPUT_CONNECTIONS), &asynchronous).await?,
            reports: pool(REPORTERS + 2, HOT_PATH_SETTINGS).await?,
            session: pool(1, &[]).await?,
        })
    }

    async fn close(self) {
        for pool in [self.claims, self.reports, self.session] {
            // Of no use to anybody now; a server that is away must not hold the exit up.
            let _ = timeout(LAST_REPORTS, pool.close()).await;
        }
    }
}

/// The loops of a worker, in the order in which they stop.
struct Running {
    worker: String,
    executor: Arc<Executor>,
    /// Hello and claims.
    intake: JoinSet<()>,
    attempts: TaskTracker,
    reporters: JoinSet<()>,
    /// Heartbeats and the session.
    upkeep: JoinSet<()>,
    stop: CancellationToken,
    all_ran: CancellationToken,
    give_up: CancellationToken,
    all_reported: CancellationToken,
    drain_timeout: Duration,
}

impl Running {
    /// Waits for the shutdown, or for the end of a loop that must not end.
    async fn until_stopped(&mut self) -> Result<(), Error> {
        let ended = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Ok(()),
            Some(ended) = self.intake.join_next() => ended,
            Some(ended) = self.reporters.join_next() => ended,
            Some(ended) = self.upkeep.join_next() => ended,
        };
        Err(Error::Stopped(ended.map_or_else(|error| error.to_string(), |()| "a loop ended early".into())))
    }

    async fn drain(&mut self) {
        let ends = Instant::now() + self.drain_timeout.min(LONGEST);
        self.stop.cancel();
        while self.intake.join_next().await.is_some() {}
        self.attempts.close();
        if timeout_at(ends, self.attempts.wait()).await.is_err() {
            let dropped = self.attempts.len();
            tracing::warn!(
                dropped,
                "handlers still ran at the end of the drain and were dropped; their leases will expire"
            );
            self.executor.held.give_up_all();
            // A handler that blocks its thread cannot be dropped.
            let _ = timeout(LAST_REPORTS, self.attempts.wait()).await;
        }
        self.all_ran.cancel();
        let reports_end = ends.max(Instant::now() + LAST_REPORTS);
        let reported = async { while self.reporters.join_next().await.is_some() {} };
        if timeout_at(reports_end, reported).await.is_err() {
            self.give_up.cancel();
            self.reporters.shutdown().await;
            let unreported = self.executor.results.waiting();
            tracing::error!(
                unreported,
                "results could not be reported before the end of the drain; their steps will run again"
            );
        }
        // The session ends last: its lock says that this worker lives.
        self.all_reported.cancel();
        while self.upkeep.join_next().await.is_some() {}
        tracing::info!(worker = self.worker, "the worker has drained");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its loops end with it, and nobody would report what handlers still do.
        self.executor.held.give_up_all();
    }
}

/// Follows the stored settings of traces: those that concern live spans.
async fn follow_settings(follower: Follower, stop: CancellationToken) {
    let apply = |config: TraceConfig| -> Applying {
        Box::pin(async move { telemetry::apply(&config).map_err(|error| error.to_string()) })
    };
    follower.run(apply, || telemetry::live_spans().summary(), stop).await;
}

/// What the database knows of this worker.
struct Presence {
    worker: String,
    namespace: String,
    version: String,
    slots: i32,
    lock_key: i64,
    handlers: Vec<String>,
    queues: Vec<String>,
    wakes: Vec<Arc<Notify>>,
    held: Arc<Held>,
    /// Our session holds the lock. Only then may the database conclude anything from it.
    locked: AtomicBool,
    /// The session listens, or was lost: the database should hear of it.
    changed: Notify,
    /// The first hello was answered.
    known: CancellationToken,
    /// Someone changed where traces go.
    trace_changed: Arc<Notify>,
}

impl Presence {
    /// Hello at start, every 10 s and after a reconnect; bye when `stop` fires.
    async fn say_hello(self: Arc<Self>, pool: PgPool, stop: CancellationToken) {
        let mut line = Line::new(pool);
        let mut failures = 0;
        // The lock comes before the hello that names it. Behind a pooler there may be no lock.
        let _ = timeout(Duration::from_secs(2), stop.run_until_cancelled(self.changed.notified())).await;
        while !stop.is_cancelled() {
            let wait = match self.hello(&mut line).await {
                Ok(()) => {
                    failures = 0;
                    self.known.cancel();
                    HELLO_EVERY
                }
                Err(error) => {
                    line.broken();
                    if failures == 0 {
                        tracing::warn!(%error, "the worker cannot announce itself; it is tried until the database answers");
                    }
                    failures += 1;
                    backoff(failures - 1)
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.changed.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
        let bye = async {
            for failures in 0.. {
                match async { protocol::worker_bye(line.get().await?, &self.worker).await }.await {
                    Ok(()) => return,
                    Err(_) => line.broken(),
                }
                tokio::time::sleep(backoff(failures)).await;
            }
        };
        // Without it the worker counts as alive for another 30 s: a pity, no harm.
        let _ = timeout(LAST_REPORTS, bye).await;
    }

    async fn hello(&self, line: &mut Line) -> Result<(), StoreError> {
        let hello = Hello {
            worker: &self.worker,
            namespace: &self.namespace,
            queues: &self.queues,
            handlers: &self.handlers,
            slots: self.slots,
            lock_key: self.locked.load(Ordering::Relaxed).then_some(self.lock_key),
            version: &self.version,
        };
        protocol::worker_hello(line.get().await?, &hello).await
    }

    /// Holds the lock and listens until `stop` fires; a lost session is made again.
    async fn listen(self: Arc<Self>, pool: PgPool, stop: CancellationToken) {
        let mut failures = 0;
        loop {
            let session = async {
                let result = self.listen_once(&pool, &mut failures).await;
                if self.locked.swap(false, Ordering::Relaxed) {
                    self.changed.notify_one();
                }
                if let Err(error) = result {
                    if failures == 0 {
                        tracing::warn!(%error, "nobody can wake this worker; it polls until it can listen again");
                    }
                    failures += 1;
                }
                tokio::time::sleep(backoff(failures.saturating_sub(1))).await;
            };
            if stop.run_until_cancelled(session).await.is_none() {
                return;
            }
        }
    }

    /// One session, from its beginning to its loss.
    async fn listen_once(&self, pool: &PgPool, failures: &mut u32) -> Result<(), StoreError> {
        let mut listener = PgListener::connect_with(pool).await?;
        // A new session has no lock, so it must not come about unseen.
        listener.eager_reconnect(false);
        for attempt in 0.. {
            // The server may not have noticed yet that our last session is gone.
            let locked = protocol::take_lock(&mut listener, self.lock_key).await?;
            self.locked.store(locked, Ordering::Relaxed);
            if locked || attempt == 10 {
                break;
            }
            tokio::time::sleep(backoff(attempt)).await;
        }
        listener.listen(CHANNEL).await?;
        *failures = 0;
        self.changed.notify_one();
        // What happened before we listened was told to nobody.
        self.wakes.iter().for_each(|wake| wake.notify_one());
        self.held.beat_now();
        while let Some(notification) = listener.try_recv().await? {
            self.told(notification.payload());
        }
        Ok(())
    }

    fn told(&self, payload: &str) {
        if payload.strip_prefix("cancel:") == Some(&self.worker) {
            self.held.beat_now();
        } else if payload == "trace" {
            self.trace_changed.notify_one();
        } else if let Some(at) = self.queues.iter().position(|queue| queue == payload) {
            self.wakes[at].notify_one();
        }
    }
}

/// A connection that one loop keeps for itself: the pool would ask the server about it each
/// time it is given back.
pub(crate) struct Line {
    pool: PgPool,
    conn: Option<PoolConnection<Postgres>>,
}

impl Line {
    pub(crate) fn new(pool: PgPool) -> Self {
        Self { pool, conn: None }
    }

    pub(crate) async fn get(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        let conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.pool.acquire().await?,
        };
        Ok(self.conn.insert(conn))
    }

    /// After any error: the next `get` brings another connection.
    pub(crate) fn broken(&mut self) {
        if let Some(mut conn) = self.conn.take() {
            conn.close_on_drop();
        }
    }
}

/// Between tries while the database does not answer: 50 ms doubling to 2 s.
pub(crate) fn backoff(failures: u32) -> Duration {
    jittered(Duration::from_millis(50 << failures.min(6)).min(Duration::from_secs(2)))
}

/// Between three quarters and the whole of it, so that workers do not go in step.
pub(crate) fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(rand::random_range(0.75..=1.0))
}

fn physical_queue(namespace: &str, queue: Option<&str>) -> String {
    match queue {
        None => format!("worker_{namespace}"),
        Some(queue) => format!("worker_{namespace}__{queue}"),
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), Error> {
    let words = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = name.len() <= 40
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.split('_').all(|word| !word.is_empty() && word.chars().all(words));
    if good { Ok(()) } else { Err(Error::Name { what, name: name.to_owned() }) }
}

fn default_name() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}-{}-{:04x}", std::process::id(), rand::random::<u16>())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_worker_that_could_never_work_is_not_built() {
        let build =
            |change: fn(Builder) -> Builder| change(Worker::builder("postgresql:///x").builtins()).build().map(drop);
        assert!(build(|b| b).is_ok());
        assert!(matches!(build(|b| b.namespace("a__b")), Err(Error::Name { what: "namespace", .. })));
        assert!(matches!(build(|b| b.namespace("")), Err(Error::Name { .. })));
        assert!(matches!(build(|b| b.queue(Some("Slow"))), Err(Error::Name { what: "queue", .. })));
        assert!(matches!(build(|b| b.queue(Some("slow_"))), Err(Error::Name { .. })));
        assert!(matches!(build(|b| b.slots(0)), Err(Error::Slots)));
        assert!(
            matches!(build(|b| b.handler("echo", handlers::echo)), Err(Error::DuplicateHandler(name)) if name == "echo")
        );
        assert!(matches!(Worker::builder("postgresql:///x").build(), Err(Error::NoHandlers)));
    }

    #[tokio::test]
    async fn a_notification_wakes_the_loop_it_is_for_and_no_other() {
        let wakes: Vec<Arc<Notify>> = vec![Arc::default(), Arc::default()];
        let presence = Presence {
            trace_changed: Arc::default(),
            worker: "w1".into(),
            namespace: "shop".into(),
            version: String::new(),
            slots: 1,
            lock_key: 0,
            handlers: Vec::new(),
            queues: vec!["worker_shop".into(), "worker_shop__slow".into()],
            wakes: wakes.clone(),
            held: Arc::default(),
            locked: AtomicBool::new(false),
            changed: Notify::new(),
            known: CancellationToken::new(),
        };
        let woken = || wakes.iter().map(|wake| wake.notified().now_or_never().is_some()).collect::<Vec<_>>();
        for other in ["worker_shops", "step_results", "admit", "cancel:w2", "cancel:w1"] {
            presence.told(other);
        }
        assert_eq!(woken(), [false, false]);
        presence.told("worker_shop__slow");
        assert_eq!(woken(), [false, true]);
        presence.told("worker_shop");
        assert_eq!(woken(), [true, false]);
    }

    #[test]
    fn two_workers_of_one_process_have_different_names() {
        let name = default_name();
        assert!(name.contains(&format!("-{}-", std::process::id())), "{name}");
        assert!((0..8).any(|_| default_name() != name));
    }
}
