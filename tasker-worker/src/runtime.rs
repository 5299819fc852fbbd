//! A worker from its first hello to the end of its drain: which loops run, on
//! which connections, and in which order they stop.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use sqlx::PgPool;
#[cfg(feature = "metrics")]
use tasker_shared::metrics::{self, Listen};
use tasker_shared::server;
use tasker_shared::state_machine::duration::LONGEST;
use tasker_shared::store::HOT_PATH_SETTINGS;
use tasker_shared::store::redaction;
use tasker_shared::store::tx::{self, PoolOptions};
#[cfg(feature = "otlp")]
use tasker_shared::telemetry;
#[cfg(feature = "otlp")]
use tasker_shared::telemetry::settings::{Applying, Follower};
#[cfg(feature = "otlp")]
use tasker_shared::trace::config::{Sources, Stored, TraceConfig};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::claim::Claimer;
use crate::context::Capture;
use crate::executor::Executor;
use crate::held::{self, Held};
use crate::measure::Numbers;
use crate::presence::{LAST_REPORTS, Presence};
use crate::registry::Registry;
use crate::report::{REPORTERS, Reporter, Results};

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
    /// A handler that no template can name.
    #[error(
        "handlers: {0:?} is no name of a handler; use lower-case letters, digits and underscores, in parts separated by dots, beginning with a letter, 100 bytes at most"
    )]
    Handler(String),
    /// What the worker calls itself, or its version.
    #[error("{0}: must have {1} to 200 bytes and no control characters")]
    Label(&'static str, usize),
    /// No room to run anything.
    #[error("slots: must be from 1 to 100000")]
    Slots,
    /// The database was not reached at the start.
    #[error("the database: {0}")]
    Connect(#[from] sqlx::Error),
    /// The server, the database or the way to it is not as it must be.
    #[error(transparent)]
    Server(server::Error),
    /// The file that `TASKER_REDACTION_FILE` names.
    #[error(transparent)]
    Redaction(#[from] tasker_shared::redact::Error),
    /// The listener of metrics.
    #[cfg(feature = "metrics")]
    #[error("metrics_listen: {0}; give another address, or none")]
    Metrics(std::io::Error),
    /// A loop of the worker panicked.
    #[error("the worker stopped: {0}; this is a defect of Tasker")]
    Stopped(String),
}

impl From<server::Error> for Error {
    fn from(error: server::Error) -> Self {
        match error {
            server::Error::Database(error) => Self::Connect(error),
            other => Self::Server(other),
        }
    }
}

/// Claims steps and runs their handlers.
pub struct Worker {
    pub(crate) url: String,
    pub(crate) namespace: String,
    pub(crate) queues: Vec<Option<String>>,
    pub(crate) registry: Registry,
    pub(crate) slots: usize,
    pub(crate) drain_timeout: Duration,
    pub(crate) cancel_grace: Duration,
    pub(crate) name: String,
    pub(crate) version: String,
    #[cfg(feature = "metrics")]
    pub(crate) metrics: Option<Listen>,
    pub(crate) capture: Capture,
    #[cfg(feature = "otlp")]
    pub(crate) trace_settings: Option<Sources>,
}

impl Worker {
    /// Its name: `claimed_by` of steps, `worker` of attempts and spans.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Works until `shutdown` fires, then drains: claims nothing more, lets running handlers
    /// finish for `drain_timeout`, reports everything, and returns. Handlers that still run
    /// then are dropped, as all are if this future is, and other workers get their steps when
    /// the leases expire.
    ///
    /// # Errors
    /// Before it claims anything: [`Error::Connect`] if the database is not reached (later it may come and
    /// go), [`Error::Server`] if it is not one that Tasker can use, [`Error::Redaction`] if the file of
    /// `TASKER_REDACTION_FILE` cannot be used, `Error::Metrics` if the listener's address cannot be had. Later
    /// [`Error::Stopped`], if a loop of the worker panics.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        #[cfg(feature = "metrics")]
        let _metrics = match self.metrics {
            // A worker's role may read no table: what the database knows, orchestrators tell.
            Some(listen) => Some(metrics::serve(listen, metrics::text).await.map_err(Error::Metrics)?),
            None => None,
        };
        let pools = Pools::open(&self.url, self.queues.len()).await.map_err(server::Error::from)?;
        server::ready(&pools.claims).await?;
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
        #[cfg(feature = "otlp")]
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
        #[cfg(feature = "otlp")]
        if let Some(follower) = follower {
            upkeep.spawn(follow_settings(follower, all_reported.clone()));
        }
        upkeep.spawn(held::beat(held, pools.claims.clone(), all_reported.clone()));
        let mut reporters = JoinSet::new();
        for _ in 0..REPORTERS {
            let reporter = Reporter {
                inbox: Arc::clone(&inbox),
                results: Arc::clone(&executor.results),
                held: Arc::clone(&executor.held),
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
#[cfg(feature = "otlp")]
async fn follow_settings(follower: Follower, stop: CancellationToken) {
    let apply = |config: TraceConfig| -> Applying {
        Box::pin(async move { telemetry::apply(&config).map_err(|error| error.to_string()) })
    };
    follower.run(apply, || telemetry::live_spans().summary(), stop).await;
}

fn physical_queue(namespace: &str, queue: Option<&str>) -> String {
    match queue {
        None => format!("worker_{namespace}"),
        Some(queue) => format!("worker_{namespace}__{queue}"),
    }
}
