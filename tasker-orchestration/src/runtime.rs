//! One orchestrator: its loops, what wakes them, and how it stops.
//!
//! LISTEN/NOTIFY is a hint; each loop also polls, with a jittered pause that backs off to 5 s,
//! because a sender may have looked at our `asleep` mark just before we set it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::export::{Exporter, StartError};
use rand::RngExt;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgListener;
use sqlx::{PgPool, Postgres};
use tasker_shared::metrics::Stats;
use tasker_shared::server;
use tasker_shared::store::tx::{self, PoolOptions};
use tasker_shared::store::{self, HOT_PATH_SETTINGS, requests};
use tasker_shared::telemetry::settings::{self, Applying, Follower};
use tasker_shared::telemetry::{self, live};
use tasker_shared::trace::config::{Resolved, Sources, TraceConfig};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::lifecycle::admission::Found;
use crate::lifecycle::inbox::{settle_requests, settle_results};
use crate::lifecycle::locks::{self, LOCK_TIMEOUT};
use crate::lifecycle::queue::{self, Message, STEP_RESULTS, TASK_REQUESTS};
use crate::lifecycle::{Shared, admission, sweep};
use crate::partitions::Partitions;
use crate::{retention, schedules};

/// How an orchestrator runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where spans go; disabled sends none and writes no export batches.
    pub trace: TraceConfig,
    /// With these, `trace` is only what holds until the stored settings are read: what these and
    /// the stored settings give then holds, also after each change.
    pub settings: Option<Sources>,
    /// Messages settled in one transaction, at most.
    pub batch: i32,
    /// Loops that settle results side by side: while one waits for its commit, another works.
    pub settlers: usize,
    /// Where retention archives tasks before it removes them, one file a day; `None` archives nothing.
    pub archive_dir: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { trace: TraceConfig::default(), settings: None, batch: 500, settlers: 2, archive_dir: None }
    }
}

/// How long spans may take to be acknowledged once tracing was switched off.
const DISABLE_FLUSH: Duration = Duration::from_secs(2);

/// An orchestrator could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The server, the database or the way to it is not as it must be.
    #[error(transparent)]
    Server(server::Error),
    /// The exporter.
    #[error("traces cannot be exported: {0}")]
    Export(#[from] StartError),
    /// The settings of traces.
    #[error("traces cannot be exported: {0}")]
    Settings(#[from] settings::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

impl From<server::Error> for Error {
    fn from(error: server::Error) -> Self {
        match error {
            server::Error::Database(error) => Self::Store(error.into()),
            other => Self::Server(other),
        }
    }
}

/// How long a message that was read stays hidden: far longer than any settle takes, short
/// enough that a killed orchestrator's messages come back soon.
const READ_SECONDS: i32 = 10;
/// The longest a loop sleeps without being woken.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The same for further settlers: the first polls for all of them, and wakes the others when there is much.
const SPARE_PAUSE: Duration = Duration::from_secs(30);
/// How often a loop says again that it reads its queue.
const REGISTER_EVERY: Duration = Duration::from_hours(6);
/// Between two looks at the locks of workers.
const LOCK_LOOKS: Duration = Duration::from_millis(500);
/// Until the second look at a lock that was free. A worker that has lost its session says so, or
/// has its lock again, in a tenth of that; a busy machine may take the rest.
const LOCK_LOOKS_AGAIN: Duration = Duration::from_secs(1);
/// How long a worker whose session was lost may take to have its lock again: it tries every 2 s at least.
const RECONNECTING: Duration = Duration::from_secs(3);

/// A running orchestrator. Any number of them may share one database.
#[derive(Debug)]
pub struct Orchestrator {
    shared: Arc<Shared>,
    stop: CancellationToken,
    loops: JoinSet<()>,
}

impl Orchestrator {
    /// Connects and starts the loops; the schema must be migrated.
    ///
    /// # Errors
    /// [`Error::Store`] if the database is not reached, [`Error::Server`] if it is not one that Tasker can use,
    /// [`Error::Settings`] or [`Error::Export`] if the export of traces cannot start as it is set.
    pub async fn start(url: &str, options: &Options) -> Result<Self, Error> {
        let settlers = options.settlers.max(1);
        let connections = u32::try_from(settlers).unwrap_or(1);
        let mut session: Vec<(&str, &str)> = HOT_PATH_SETTINGS.iter().copied().chain([LOCK_TIMEOUT]).collect();
        let pool = tx::pool(url, &pool_options("tasker-orchestration", connections + 5, &session))
            .await
            .map_err(server::Error::from)?;
        server::ready(&pool).await?;
        session.push(("synchronous_commit", "off"));
        let reads = tx::pool(url, &pool_options("tasker-orchestration reads", connections + 5, &session)).await?;
        let instance = Uuid::new_v4();
        let trace = trace_of(options, &reads).await?;
        let exporter = if trace.config.enabled {
            Some(Exporter::start(&trace.config, pool.clone(), instance).await?)
        } else {
            None
        };
        let config = &trace.config;
        tracing::info!(
            enabled = config.enabled,
            to = config.destination(),
            sample_rate = config.sample_rate,
            live_spans = %config.areas(),
            "traces"
        );
        let shared = Arc::new(Shared::new(pool, reads, instance, exporter));
        admission::refresh(&shared).await?;

        let stop = CancellationToken::new();
        let wakes = Arc::new(Wakes::default());
        let mut loops = JoinSet::new();
        let follower = Follower {
            pool: shared.reads.clone(),
            kind: "orchestrator",
            name: settings::process_name(),
            version: env!("CARGO_PKG_VERSION").into(),
            sources: options.settings.clone(),
            now: trace,
            wake: shared.trace_settings.clone(),
        };
        loops.spawn(follow(follower, shared.clone(), stop.clone()));
        let listener = PgListener::connect(url).await?;
        loops.spawn(listen(listener, url.to_owned(), shared.clone(), wakes.clone(), stop.clone()));
        loops.spawn(read_requests(shared.clone(), wakes.clone(), options.batch, stop.clone()));
        for settler in 0..settlers {
            loops.spawn(read_results(shared.clone(), wakes.clone(), options.batch, settler, stop.clone()));
        }
        loops.spawn(run_sweep(shared.clone(), stop.clone()));
        loops.spawn(watch_workers(shared.clone(), stop.clone()));
        loops.spawn(run_admission(shared.clone(), stop.clone()));
        loops.spawn(locks::watch(shared.clone(), stop.clone()));
        loops.spawn(retention::run(shared.clone(), options.archive_dir.clone(), stop.clone()));
        Ok(Self { shared, stop, loops })
    }

    /// What was delivered to the receiver of traces; `None` when tracing is off.
    pub fn export_stats(&self) -> Option<Arc<Stats>> {
        self.shared.exporter().map(|exporter| exporter.stats().clone())
    }

    /// Waits until the spans of everything settled so far are acknowledged; false if that took too long.
    pub async fn flush(&self, deadline: Duration) -> bool {
        match self.shared.exporter() {
            Some(exporter) => exporter.flush(deadline).await,
            None => true,
        }
    }

    /// Finishes the batches that are being settled, delivers their spans, and stops.
    pub async fn shutdown(mut self, deadline: Duration) {
        self.stop.cancel();
        while self.loops.join_next().await.is_some() {}
        if let Some(exporter) = self.shared.exporter() {
            exporter.shutdown(deadline).await;
        }
        if let Ok(mut conn) = self.shared.reads.acquire().await {
            for reader in readers(self.shared.instance) {
                let _ = requests::unregister(&mut conn, &reader).await;
            }
        }
        self.shared.connections.give_back();
        self.shared.pool.close().await;
        self.shared.reads.close().await;
    }
}

fn pool_options<'a>(name: &'a str, connections: u32, settings: &'a [(&'a str, &'a str)]) -> PoolOptions<'a> {
    PoolOptions {
        max_connections: connections,
        // While the server does not listen, a pool tries again after a fifth of this at most.
        acquire_timeout: Duration::from_secs(10),
        application_name: name,
        settings,
    }
}

fn readers(instance: Uuid) -> impl Iterator<Item = String> {
    (0..16).map(move |number| reader(instance, number))
}

fn reader(instance: Uuid, number: usize) -> String {
    format!("{instance}/{number}")
}

/// What holds for traces at the start.
async fn trace_of(options: &Options, reads: &PgPool) -> Result<Resolved, Error> {
    let Some(sources) = &options.settings else {
        return Ok(Resolved { config: options.trace.clone(), warnings: Vec::new(), origins: Vec::new() });
    };
    let mut conn = reads.acquire().await?;
    let (resolved, _) = settings::read(&mut conn, sources).await?;
    if resolved.config != options.trace
        && let Err(error) = telemetry::apply(&resolved.config)
    {
        tracing::warn!(%error, "live spans are not exported");
    }
    Ok(resolved)
}

/// Makes a new configuration hold.
async fn apply(shared: Arc<Shared>, config: TraceConfig) -> Result<(), String> {
    telemetry::apply(&config).map_err(|error| error.to_string())?;
    match (shared.exporter(), config.enabled) {
        (None, false) => {}
        (Some(exporter), true) => exporter.reconfigure(&config).map_err(|error| error.to_string())?,
        // What the former one left in the database is adopted under the new one's name.
        (None, true) => {
            let exporter = Exporter::start(&config, shared.pool.clone(), Uuid::new_v4()).await;
            shared.replace_exporter(Some(exporter.map_err(|error| error.to_string())?));
        }
        // What it cannot deliver by then waits in the database.
        (Some(exporter), false) => {
            shared.replace_exporter(None);
            exporter.shutdown(DISABLE_FLUSH).await;
        }
    }
    Ok(())
}

/// Follows the stored settings of traces while the orchestrator runs.
async fn follow(follower: Follower, shared: Arc<Shared>, stop: CancellationToken) {
    let applied_to = shared.clone();
    let apply = move |config| -> Applying { Box::pin(apply(applied_to.clone(), config)) };
    let health = || match shared.exporter() {
        Some(exporter) => exporter.stats().summary(),
        None => serde_json::Value::Null,
    };
    follower.run(apply, health, stop.clone()).await;
}

#[derive(Debug, Default)]
struct Wakes {
    requests: Notify,
    results: Notify,
}

/// Turns notifications into wake-ups; a lost connection is made anew, and wakes everyone once.
async fn listen(
    mut listener: PgListener,
    url: String,
    shared: Arc<Shared>,
    wakes: Arc<Wakes>,
    stop: CancellationToken,
) {
    loop {
        let listening = async {
            listener.listen("tasker").await?;
            loop {
                let notification = listener.recv().await?;
                match notification.payload() {
                    TASK_REQUESTS => wakes.requests.notify_one(),
                    STEP_RESULTS => wakes.results.notify_one(),
                    "admit" => shared.admission.wake.notify_one(),
                    "due" => shared.due.notify_one(),
                    "trace" => shared.trace_settings.notify_one(),
                    _ => {}
                }
            }
            #[expect(unreachable_code, reason = "it names the error's type")]
            Ok::<(), sqlx::Error>(())
        };
        tokio::select! {
            () = stop.cancelled() => return,
            result = listening => if let Err(error) = result
                && !shared.outage.handles(&error)
            {
                tracing::warn!(%error, "the connection that listens for wake-ups was lost; polling meanwhile");
            },
        }
        let connecting = async {
            loop {
                tokio::time::sleep(shared.outage.pause()).await;
                match PgListener::connect(&url).await {
                    Ok(fresh) => return fresh,
                    Err(error) => _ = shared.outage.handles(&error),
                }
            }
        };
        let Some(fresh) = stop.run_until_cancelled(connecting).await else { return };
        shared.outage.answered();
        listener = fresh;
        wakes.requests.notify_one();
        wakes.results.notify_one();
        shared.admission.wake.notify_one();
        shared.due.notify_one();
        shared.trace_settings.notify_one();
    }
}

/// How long a loop that found nothing sleeps: longer each time, never in step with others.
struct Pause {
    next: Duration,
    longest: Duration,
}

impl Pause {
    fn up_to(longest: Duration) -> Self {
        Self { next: Duration::from_millis(8), longest }
    }

    fn reset(&mut self) {
        *self = Self::up_to(self.longest);
    }

    fn next(&mut self) -> Duration {
        let jitter = rand::rng().random_range(0.75..1.0);
        let pause = self.next.mul_f64(jitter);
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    async fn sleep(&mut self, wake: &Notify, stop: &CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = wake.notified() => self.reset(),
            () = tokio::time::sleep(self.next()) => {}
        }
    }
}

/// Says that a loop reads its queue, if it has not lately: what says nothing for a day is forgotten.
async fn register(shared: &Shared, inbox: &mut Inbox, stop: &CancellationToken) {
    while !stop.is_cancelled() && inbox.registered.is_none_or(|at| at.elapsed() > REGISTER_EVERY) {
        let (queue, reader) = (inbox.queue, &inbox.reader);
        match async { queue::register(&mut *shared.reads.acquire().await?, queue, reader).await }.await {
            Ok(()) => inbox.registered = Some(Instant::now()),
            Err(error) => {
                let pause = if shared.outage.handles(&error) {
                    shared.outage.pause()
                } else {
                    tracing::warn!(%error, queue, "this orchestrator could not announce itself as a reader; trying again");
                    Duration::from_millis(500)
                };
                stop.run_until_cancelled(tokio::time::sleep(pause)).await;
            }
        }
    }
}

async fn read_requests(shared: Arc<Shared>, wakes: Arc<Wakes>, batch: i32, stop: CancellationToken) {
    let mut inbox = Inbox::new(TASK_REQUESTS, reader(shared.instance, 0), batch);
    let mut pause = Pause::up_to(LONGEST_PAUSE);
    while !stop.is_cancelled() {
        register(&shared, &mut inbox, &stop).await;
        let turn = async {
            let began = SystemTime::now();
            let messages = inbox.receive(&shared).await?;
            let found = messages.len();
            if found > 0 {
                let span = settle_span(inbox.queue, began, &messages);
                let done = live::within(span.as_ref(), settle_requests(&shared, messages)).await;
                end(span, done)?;
            }
            Ok::<_, crate::lifecycle::Error>(found)
        };
        let turn = turn.await;
        after_turn(&shared, &inbox, turn, &mut pause, &wakes.requests, &stop).await;
    }
}

async fn read_results(shared: Arc<Shared>, wakes: Arc<Wakes>, batch: i32, settler: usize, stop: CancellationToken) {
    let mut inbox = Inbox::new(STEP_RESULTS, reader(shared.instance, settler + 1), batch);
    let mut pause = Pause::up_to(if settler == 0 { LONGEST_PAUSE } else { SPARE_PAUSE });
    while !stop.is_cancelled() {
        register(&shared, &mut inbox, &stop).await;
        let turn = async {
            let began = SystemTime::now();
            let messages = inbox.receive(&shared).await?;
            let found = messages.len();
            if found > 0 {
                let span = settle_span(inbox.queue, began, &messages);
                // A full batch means there is more: let another settler look at once.
                if found == usize::try_from(batch).unwrap_or(usize::MAX) {
                    wakes.results.notify_one();
                }
                let done = live::within(span.as_ref(), settle_results(&shared, messages)).await;
                end(span, done)?;
            }
            Ok::<_, crate::lifecycle::Error>(found)
        };
        let turn = turn.await;
        after_turn(&shared, &inbox, turn, &mut pause, &wakes.results, &stop).await;
    }
}

/// The live span of what was received, linked to the tasks it is about.
fn settle_span(queue: &str, began: SystemTime, messages: &[Message]) -> Option<live::LiveSpan> {
    let received = live::Received { queue, namespace: None, began, count: messages.len() };
    live::batch(received, messages.iter().filter_map(|message| message.headers.as_ref()?.get("traceparent")?.as_str()))
}

/// Marks the live span of what has failed, and ends it.
fn end<T, E>(span: Option<live::LiveSpan>, done: Result<T, E>) -> Result<T, E> {
    if let (Some(span), Err(_)) = (span, &done) {
        live::failed(&span, "error");
    }
    done
}

/// One loop's way to its queue: a connection of its own, because giving it back to the pool
/// between two reads costs two more round trips.
struct Inbox {
    queue: &'static str,
    reader: String,
    batch: i32,
    connection: Option<PoolConnection<Postgres>>,
    /// When this reader was last announced to senders.
    registered: Option<Instant>,
}

impl Inbox {
    fn new(queue: &'static str, reader: String, batch: i32) -> Self {
        Self { queue, reader, batch, connection: None, registered: None }
    }

    async fn receive(&mut self, shared: &Shared) -> Result<Vec<Message>, store::Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => shared.reads.acquire().await?,
        };
        // A connection that failed is not kept.
        let messages = queue::receive(&mut connection, self.queue, &self.reader, READ_SECONDS, self.batch).await?;
        self.connection = Some(connection);
        Ok(messages)
    }
}

/// Goes on at once after work, and sleeps after none. Reading a lone message has marked the
/// reader asleep, as reading none has: it is woken by the next, and to look at once for what is
/// hardly there would take the processor from whoever has to do with the lone one.
async fn after_turn(
    shared: &Shared,
    inbox: &Inbox,
    turn: Result<usize, crate::lifecycle::Error>,
    pause: &mut Pause,
    wake: &Notify,
    stop: &CancellationToken,
) {
    if turn.is_ok() {
        shared.outage.answered();
    }
    match turn {
        Ok(0) => pause.sleep(wake, stop).await,
        Ok(1) if inbox.batch > 1 => {
            pause.reset();
            pause.sleep(wake, stop).await;
        }
        Ok(_) => pause.reset(),
        Err(error) => {
            let pause = if shared.outage.handles(&error) {
                shared.outage.pause()
            } else {
                tracing::warn!(%error, queue = inbox.queue, "a batch failed; its messages come back");
                Duration::from_millis(200)
            };
            stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }
}

/// Sleeps until the earliest due time, and is woken by whoever creates an earlier one.
async fn run_sweep(shared: Arc<Shared>, stop: CancellationToken) {
    let mut partitions = Partitions::new();
    while !stop.is_cancelled() {
        let turn = async {
            let swept = sweep::sweep(&shared).await?;
            if !swept.schedules.is_empty() {
                schedules::run(&shared, &swept.schedules).await?;
            }
            if swept.taken > 0 {
                return Ok(Duration::ZERO);
            }
            let mut conn = shared.reads.acquire().await.map_err(store::Error::from)?;
            partitions.look(&shared, &mut conn).await;
            let ahead = sweep::ahead(&mut conn).await?;
            if ahead.claims {
                shared.claims.notify_one();
            }
            let next =
                ahead.due_ms.map_or(LONGEST_PAUSE, |ms| Duration::from_millis(u64::try_from(ms).unwrap_or(0) + 1));
            Ok::<_, crate::lifecycle::Error>(next.min(LONGEST_PAUSE))
        };
        let pause = match turn.await {
            Ok(pause) => {
                shared.outage.answered();
                pause
            }
            Err(error) if shared.outage.handles(&error) => shared.outage.pause(),
            Err(error) => {
                tracing::warn!(%error, "a sweep failed; what is due stays due");
                Duration::from_millis(500)
            }
        };
        if pause > Duration::ZERO {
            tokio::select! {
                () = stop.cancelled() => {}
                () = shared.due.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// Looks twice a second at the locks of the workers that hold claims, for as long as any does. A lock
/// that was free twice, with a second between, is that of a dead worker.
async fn watch_workers(shared: Arc<Shared>, stop: CancellationToken) {
    while stop.run_until_cancelled(shared.claims.notified()).await.is_some() {
        let mut suspects = Vec::new();
        let mut trusted_from = Instant::now();
        loop {
            let pause = if suspects.is_empty() { LOCK_LOOKS } else { LOCK_LOOKS_AGAIN };
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            match sweep::look_for_dead_workers(&shared, &suspects).await {
                Ok(looked_at) if !looked_at.claims => break,
                Ok(looked_at) => suspects = looked_at.unlocked.into_iter().filter(|worker| !worker.dead).collect(),
                Err(error) => {
                    // Whatever kept us from the server may have cost the workers their sessions too.
                    trusted_from = Instant::now() + RECONNECTING;
                    shared.outage.handles(&error);
                    tracing::debug!(%error, "the workers' locks could not be looked at; their leases decide meanwhile");
                }
            }
            if Instant::now() < trusted_from {
                suspects.clear();
            }
        }
    }
}

/// Keeps the estimate of room fresh while it is used, and lets held steps in.
async fn run_admission(shared: Arc<Shared>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let began = Instant::now();
        let pause = match admission::admit(&shared).await {
            Ok(Found::More) => continue,
            Ok(Found::Nothing(next)) => next.unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE),
            Err(error) if shared.outage.handles(&error) => shared.outage.pause(),
            Err(error) => {
                tracing::warn!(%error, "held steps could not be admitted; trying again");
                LONGEST_PAUSE
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = shared.admission.wake.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
        // However often it is woken: counting a queue is not free.
        tokio::time::sleep(Duration::from_millis(20).saturating_sub(began.elapsed())).await;
    }
}
