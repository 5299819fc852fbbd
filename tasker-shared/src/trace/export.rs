//! Delivery: what a settle hands over is encoded, sent, acknowledged, and only then forgotten.
//!
//! Export never blocks work: the queue is bounded, and what does not fit is released in the
//! database for a later recovery. A row of `export_batches` is deleted only after a receiver
//! took its spans; the rows of a dead orchestrator are adopted and derived again from the log.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::bytes::Bytes;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::config::TraceConfig;
use super::log::TaskLog;
use super::otlp::{Encoder, ServiceNames};
use super::sampling::{Kept, exported, is_sampled, is_within};
use super::span::TaskSpans;
use super::transport::{self, Error as TransportError, SendError, Transport};
use super::tree;
use crate::metrics::metrics;
use crate::state_machine::retry::LONGEST;
use crate::store::exports::Orphan;
use crate::store::{self, exports, transitions};

/// Log rows held in memory at most; about 100 MB when full.
const MAX_QUEUED_ROWS: usize = 200_000;
/// A request is closed at this many spans or bytes: collectors refuse more than 4 MiB.
const MAX_REQUEST_SPANS: usize = 4096;
const MAX_REQUEST_BYTES: usize = 2 * 1024 * 1024;
/// Requests on their way at one time.
const MAX_IN_FLIGHT: usize = 4;
/// Logs that are read together.
const READ_AT_ONCE: usize = 50;
/// Batches adopted in one go, and how often dead owners are looked for.
const ADOPT: i64 = 200;
/// A task with more log rows than this has all its batches adopted at once, so many at most.
const LARGE_TASK_ROWS: usize = 1000;
const ADOPT_OF_LARGE: i64 = 20_000;
const ADOPT_EVERY: Duration = Duration::from_secs(10);
const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// After this time whatever was in doubt stands in the database, or never will.
const DOUBT_SETTLES: Duration = Duration::from_secs(16);

/// What one transaction moved.
#[derive(Debug)]
pub struct Batch {
    /// Its row in `export_batches`.
    pub batch_id: Uuid,
    /// The time that all its moves bear.
    pub at: DateTime<Utc>,
    /// Slices of the log, one per task, from memory.
    pub slices: Vec<TaskLog>,
    /// Tasks whose log must be read: the slice was not in memory, or was not sampled and may be
    /// worth keeping.
    pub read: Vec<Uuid>,
    /// Spans that are derived already.
    pub derived: Vec<TaskSpans>,
}

/// What was delivered, and what waits.
#[derive(Debug, Default)]
pub struct Stats {
    /// Spans that a receiver acknowledged.
    pub exported: AtomicU64,
    /// Of these, spans that were derived again from the log.
    pub re_exported: AtomicU64,
    /// Batches given up to the database because memory was full.
    pub released: AtomicU64,
    /// Logs that were read again for batches of dead orchestrators.
    pub recovered_logs: AtomicU64,
    /// Spans given up because no receiver took them within `max_export_lag`.
    pub abandoned: AtomicU64,
    /// Requests that failed and were tried again.
    pub failed_requests: AtomicU64,
    /// Spans that a receiver took and then said it dropped.
    pub rejected: AtomicU64,
    /// Texts in spans that were cut, or cleaned of control characters.
    pub cleaned: AtomicU64,
    /// Whether the last request failed.
    pub failing: AtomicBool,
    /// Log rows that wait in memory.
    pub queued_rows: AtomicUsize,
    /// Batches handed over and neither acknowledged nor released.
    pub open_batches: AtomicUsize,
}

impl Stats {
    /// The figures by name, for people.
    pub fn summary(&self) -> serde_json::Value {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let waiting = self.queued_rows.load(Ordering::Relaxed);
        let reached = if self.failing.load(Ordering::Relaxed) {
            "down"
        } else if load(&self.exported) > 0 {
            "up"
        } else {
            "not used yet"
        };
        serde_json::json!({
            "receiver": reached,
            "exported": load(&self.exported),
            "re_exported": load(&self.re_exported),
            "failed_requests": load(&self.failed_requests),
            "rejected": load(&self.rejected),
            "abandoned": load(&self.abandoned),
            "released_batches": load(&self.released),
            "waiting_rows": waiting,
            "waiting_batches": self.open_batches.load(Ordering::Relaxed),
        })
    }
}

/// Where spans go now; another one takes its place when the settings change.
#[derive(Debug)]
struct Target {
    transport: Transport,
    names: ServiceNames,
    max_lag: Option<Duration>,
}

impl Target {
    fn of(config: &TraceConfig) -> Result<Self, TransportError> {
        Ok(Self {
            transport: Transport::connect(config)?,
            names: config.service_names.clone(),
            max_lag: config.max_export_lag,
        })
    }
}

/// The exporter of one orchestrator. Dropping it stops nothing; see [`Exporter::shutdown`].
#[derive(Debug, Clone)]
pub struct Exporter {
    /// Names this process in `export_batches` and `instances`.
    pub instance: Uuid,
    sender: mpsc::UnboundedSender<Batch>,
    /// Batches handed over and not yet settled.
    held: Arc<Mutex<HashSet<Uuid>>>,
    /// When rows of ours may last have been left in the database without our knowledge.
    doubted_at: Arc<Mutex<Option<Instant>>>,
    stats: Arc<Stats>,
    target: Arc<RwLock<Arc<Target>>>,
    pool: PgPool,
    stop: CancellationToken,
    done: CancellationToken,
}

impl Exporter {
    /// Starts the tasks that encode, send, delete and recover.
    ///
    /// Errors if the endpoint or its credentials cannot be used at all; a collector that does
    /// not answer is no error, its spans wait.
    pub async fn start(config: &TraceConfig, pool: PgPool, instance: Uuid) -> Result<Self, StartError> {
        let target = Arc::new(Target::of(config)?);
        exports::alive(&mut *pool.acquire().await.map_err(store::Error::from)?, instance).await?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let exporter = Self {
            instance,
            sender,
            held: Arc::default(),
            doubted_at: Arc::default(),
            stats: Arc::default(),
            target: Arc::new(RwLock::new(target.clone())),
            pool,
            stop: CancellationToken::new(),
            done: CancellationToken::new(),
        };
        let worker = Worker {
            encoder: Encoder::new(&target.names),
            cleaned: 0,
            names: target.names.clone(),
            open: Vec::new(),
            slots: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            exporter: exporter.clone(),
        };
        metrics().watch_export(&exporter.stats);
        tokio::spawn(worker.run(receiver));
        tokio::spawn(recover(exporter.clone()));
        tokio::spawn(exporter.clone().probe(config.clone()));
        Ok(exporter)
    }

    /// Sends to where `config` says from now on, also what waits already.
    pub fn reconfigure(&self, config: &TraceConfig) -> Result<(), TransportError> {
        let target = Arc::new(Target::of(config)?);
        *self.target.write().unwrap_or_else(PoisonError::into_inner) = target;
        tokio::spawn(self.clone().probe(config.clone()));
        Ok(())
    }

    fn target(&self) -> Arc<Target> {
        self.target.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a receiver is there at all, so that one that is not is told of before the first span.
    async fn probe(self, config: TraceConfig) {
        if let Some(Err(error)) = self.stop.run_until_cancelled(transport::reach(&config)).await {
            self.is_away(&error);
        }
    }

    fn answers(&self) {
        if self.stats.failing.swap(false, Ordering::Relaxed) {
            tracing::info!("the receiver of traces answers again");
        }
    }

    /// Said once, until it answers again.
    fn is_away(&self, error: &SendError) {
        if !self.stats.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "spans wait: the receiver of traces did not take them; work goes on");
        }
    }

    /// Hands a batch over; never waits. A transition action, called after commit.
    pub fn hand_over(&self, batch: Batch) {
        let rows = rows(&batch);
        if self.stats.queued_rows.load(Ordering::Relaxed) + rows > MAX_QUEUED_ROWS {
            self.release(vec![batch.batch_id]);
            return;
        }
        self.stats.queued_rows.fetch_add(rows, Ordering::Relaxed);
        self.stats.open_batches.fetch_add(1, Ordering::Relaxed);
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(batch.batch_id);
        // The worker lives until shutdown; what comes later is adopted by another instance.
        let _ = self.sender.send(batch);
    }

    /// A transaction failed without saying whether it committed: its batch may stand in the
    /// database while nobody holds it. It is looked for a little later.
    pub fn doubt(&self) {
        *self.doubted_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// What was delivered so far.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Waits until everything handed over so far is acknowledged, at most until `deadline`.
    pub async fn flush(&self, deadline: Duration) -> bool {
        let until = Instant::now() + deadline.min(LONGEST);
        while self.stats.open_batches.load(Ordering::Relaxed) > 0 {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }

    /// Flushes, then stops. What could not be delivered is released to whoever recovers next.
    pub async fn shutdown(&self, deadline: Duration) {
        self.flush(deadline).await;
        self.stop.cancel();
        if let Ok(mut conn) = self.pool.acquire().await {
            let _ = exports::gone(&mut conn, self.instance).await;
        }
        self.done.cancel();
    }

    fn release(&self, batch_ids: Vec<Uuid>) {
        self.stats.released.fetch_add(batch_ids.len() as u64, Ordering::Relaxed);
        let exporter = self.clone();
        tokio::spawn(async move {
            let released = async { exports::release(&mut *exporter.pool.acquire().await?, &batch_ids).await }.await;
            if let Err(error) = released {
                tracing::warn!(%error, "export batches could not be released; they are taken up again later");
                exporter.doubt();
            }
        });
    }
}

/// The exporter could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The endpoint's settings.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
}

fn rows(batch: &Batch) -> usize {
    batch.slices.iter().map(|slice| slice.transitions.len() + told(slice)).sum::<usize>()
        + batch.read.len()
        + batch.derived.iter().map(|task| task.spans.len()).sum::<usize>()
}

/// What handlers told of themselves, as rows of its size.
fn told(slice: &TaskLog) -> usize {
    const EVENTS_A_ROW: usize = 2;
    let events = |attempt: &super::log::Attempt| {
        attempt.milestones.as_ref().and_then(serde_json::Value::as_array).map_or(0, Vec::len)
    };
    slice.attempts.iter().map(events).sum::<usize>() * EVENTS_A_ROW
}

/// A batch that is encoded but not yet acknowledged: it may span several requests.
#[derive(Debug)]
struct Open {
    batch_id: Uuid,
    at: DateTime<Utc>,
    rows: usize,
    requests: AtomicUsize,
}

struct Worker {
    encoder: Encoder,
    /// What the encoder had cleaned before the open request.
    cleaned: u64,
    /// Those that the encoder writes.
    names: ServiceNames,
    /// Batches with spans in the request that is being filled.
    open: Vec<Arc<Open>>,
    slots: Arc<Semaphore>,
    exporter: Exporter,
}

impl Worker {
    async fn run(mut self, mut receiver: mpsc::UnboundedReceiver<Batch>) {
        loop {
            let batch = tokio::select! {
                () = self.exporter.stop.cancelled() => return,
                batch = receiver.recv() => batch,
            };
            let Some(batch) = batch else { return };
            if !self.encode(batch).await {
                return;
            }
            while let Ok(batch) = receiver.try_recv() {
                if !self.encode(batch).await {
                    return;
                }
            }
            self.send().await;
        }
    }

    /// Answers `false` if the process stopped first: then its row stays for whoever recovers.
    async fn encode(&mut self, batch: Batch) -> bool {
        let (batch_id, at) = (batch.batch_id, batch.at);
        let open = Arc::new(Open { batch_id, at, rows: rows(&batch), requests: AtomicUsize::new(1) });
        self.open.push(open.clone());
        let settled = |log: &TaskLog| {
            let mut task = tree::spans(log);
            task.spans.retain(|span| span.settled_at == at);
            task
        };
        // One after another: a batch may hold the logs of hundreds of tasks.
        for spans in batch.slices.iter().map(settled).chain(batch.derived) {
            self.push(&open, &spans).await;
        }
        let (mut awaited, mut written) = (Vec::new(), HashSet::new());
        for page in batch.read.chunks(READ_AT_ONCE) {
            let Some(read) = read_logs(&self.exporter, page).await else { return false };
            for Read { log, kept, with } in read {
                let spans = match with {
                    _ if is_sampled(&log.head) => Some(settled(&log)),
                    With::Topmost => None,
                    With::Itself(others) => {
                        awaited.extend(others);
                        exported(&log, kept.as_ref())
                    }
                };
                if let Some(spans) = spans {
                    written.insert(log.head.task_uuid);
                    self.push(&open, &spans).await;
                }
            }
        }
        awaited.retain(|task| written.insert(*task));
        for page in awaited.chunks(READ_AT_ONCE) {
            let Some(read) = read_logs(&self.exporter, page).await else { return false };
            for spans in read.iter().filter_map(|read| exported(&read.log, read.kept.as_ref())) {
                self.push(&open, &spans).await;
            }
        }
        if self.encoder.spans() == 0 {
            // Nothing of it is in the open request: it counts as sent.
            for open in std::mem::take(&mut self.open) {
                settle(&self.exporter, vec![open]).await;
            }
        }
        true
    }

    /// Writes spans into the open request, and into others after it if they do not fit.
    async fn push(&mut self, open: &Arc<Open>, spans: &TaskSpans) {
        let mut next = 0;
        while next < spans.spans.len() {
            next = self.encoder.push_from(spans, next, MAX_REQUEST_BYTES);
            if self.encoder.spans() >= MAX_REQUEST_SPANS || self.encoder.bytes_len() >= MAX_REQUEST_BYTES {
                // The batch goes on in the next request: it is done when both are acknowledged.
                open.requests.fetch_add(1, Ordering::Relaxed);
                self.send().await;
                self.open.push(open.clone());
            }
        }
    }

    /// Closes the open request and sends it in the background, a few at a time.
    async fn send(&mut self) {
        if self.encoder.spans() == 0 {
            return;
        }
        let spans = self.encoder.spans() as u64;
        let cleaned = self.encoder.cleaned();
        self.exporter.stats.cleaned.fetch_add(cleaned - self.cleaned, Ordering::Relaxed);
        self.cleaned = cleaned;
        let request = self.encoder.finish();
        let target = self.exporter.target();
        if target.names != self.names {
            self.names = target.names.clone();
            self.encoder = Encoder::new(&self.names);
            self.cleaned = 0;
        }
        let open = std::mem::take(&mut self.open);
        let Ok(slot) = self.slots.clone().acquire_owned().await else {
            return;
        };
        let exporter = self.exporter.clone();
        tokio::spawn(async move {
            let newest = open.iter().map(|open| open.at).max().unwrap_or_default();
            match deliver(&exporter, request, newest).await {
                Delivery::Acknowledged => {
                    exporter.stats.exported.fetch_add(spans, Ordering::Relaxed);
                    settle(&exporter, open).await;
                }
                Delivery::Abandoned => {
                    exporter.stats.abandoned.fetch_add(spans, Ordering::Relaxed);
                    settle(&exporter, open).await;
                }
                Delivery::Stopped => {}
            }
            drop(slot);
        });
    }
}

/// What became of a request.
enum Delivery {
    Acknowledged,
    /// No receiver took it in the time that was allowed.
    Abandoned,
    /// The process stopped first.
    Stopped,
}

/// Sends until a receiver takes it, or until everything in it, the newest batch too, is older
/// than `max_export_lag`.
async fn deliver(exporter: &Exporter, request: Bytes, newest: DateTime<Utc>) -> Delivery {
    let mut wait = Duration::from_millis(100);
    loop {
        let target = exporter.target();
        match target.transport.send(request.clone()).await {
            Ok(accepted) => {
                exporter.stats.rejected.fetch_add(accepted.rejected_spans, Ordering::Relaxed);
                if accepted.rejected_spans > 0 {
                    tracing::warn!(spans = accepted.rejected_spans, "the receiver refused some spans");
                }
                exporter.answers();
                return Delivery::Acknowledged;
            }
            Err(error) => {
                exporter.stats.failed_requests.fetch_add(1, Ordering::Relaxed);
                exporter.is_away(&error);
                if target.max_lag.is_some_and(|lag| (Utc::now() - newest).to_std().is_ok_and(|age| age > lag)) {
                    tracing::error!(%error, "spans are given up: no receiver took them within max_export_lag");
                    return Delivery::Abandoned;
                }
                let pause = error.retry_after.unwrap_or(wait).min(Duration::from_secs(30));
                wait = (wait * 2).min(Duration::from_secs(5));
                tokio::select! {
                    () = exporter.done.cancelled() => return Delivery::Stopped,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }
}

/// One request of each of these batches is acknowledged; those with none left are forgotten.
async fn settle(exporter: &Exporter, open: Vec<Arc<Open>>) {
    let done: Vec<Arc<Open>> =
        open.into_iter().filter(|open| open.requests.fetch_sub(1, Ordering::AcqRel) == 1).collect();
    if done.is_empty() {
        return;
    }
    let ids: Vec<Uuid> = done.iter().map(|open| open.batch_id).collect();
    let deleted = async { exports::delete(&mut *exporter.pool.acquire().await?, &ids).await }.await;
    if let Err(error) = deleted {
        tracing::warn!(%error, "acknowledged export batches stay in the database; their spans are sent once more");
        exporter.doubt();
    }
    {
        let mut held = exporter.held.lock().unwrap_or_else(PoisonError::into_inner);
        for id in &ids {
            held.remove(id);
        }
    }
    let rows = done.iter().map(|open| open.rows).sum();
    exporter.stats.queued_rows.fetch_sub(rows, Ordering::Relaxed);
    exporter.stats.open_batches.fetch_sub(done.len(), Ordering::Relaxed);
}

/// A whole log.
struct Read {
    log: TaskLog,
    /// Why its trace is exported, though it was not sampled.
    kept: Option<Kept>,
    with: With,
}

/// With whose end a task goes out, whose trace is kept.
enum With {
    /// Its own, and with it these, which it awaited.
    Itself(Vec<Uuid>),
    /// That of the topmost task, which came after its own.
    Topmost,
}

/// Whole logs; `None` if the process stopped before they could be read.
async fn read_logs(exporter: &Exporter, task_uuids: &[Uuid]) -> Option<Vec<Read>> {
    if task_uuids.is_empty() {
        return Some(Vec::new());
    }
    let mut wait = Duration::from_millis(50);
    loop {
        let read = async { logs(&mut *exporter.pool.acquire().await?, task_uuids).await }.await;
        match read {
            Ok(logs) => return Some(logs),
            Err(error) => {
                tracing::warn!(%error, "the log of a task could not be read for its trace; trying again");
                tokio::select! {
                    () = exporter.done.cancelled() => return None,
                    () = tokio::time::sleep(wait) => wait = (wait * 2).min(Duration::from_secs(5)),
                }
            }
        }
    }
}

async fn logs(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<Read>, store::Error> {
    let logs = transitions::logs(conn, task_uuids).await?;
    let mut kept = transitions::kept(conn, &logs).await?;
    let mut read = Vec::with_capacity(logs.len());
    for log in logs {
        let task = log.head.task_uuid;
        let kept = kept.remove(&task);
        let with = match &kept {
            Some(_) if !is_within(&log.head) => With::Itself(transitions::awaited_below(conn, task, i64::MAX).await?),
            Some(_) if transitions::is_noted(conn, task).await? => With::Topmost,
            _ => With::Itself(Vec::new()),
        };
        read.push(Read { log, kept, with });
    }
    Ok(read)
}

/// Says that this instance lives, and adopts what dead ones left.
async fn recover(exporter: Exporter) {
    let mut last_adopted = None::<Instant>;
    loop {
        if let Ok(mut conn) = exporter.pool.acquire().await
            && let Err(error) = exports::alive(&mut conn, exporter.instance).await
        {
            tracing::warn!(%error, "this orchestrator could not say that it lives");
        }
        let has_room = exporter.stats.queued_rows.load(Ordering::Relaxed) < MAX_QUEUED_ROWS / 2;
        if has_room && last_adopted.is_none_or(|at| at.elapsed() >= ADOPT_EVERY) {
            match adopt(&exporter).await {
                // There may be more: look again at once.
                Ok(found) => last_adopted = (found == 0).then(Instant::now),
                Err(error) => tracing::warn!(%error, "export batches could not be adopted"),
            }
        }
        if let Err(error) = take_up(&exporter).await {
            tracing::warn!(%error, "export batches that were left behind could not be read");
        }
        let pause = if last_adopted.is_some() { ALIVE_EVERY } else { Duration::from_millis(20) };
        tokio::select! {
            () = exporter.stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Takes over orphaned batches and derives their spans from the log; answers how many.
pub async fn adopt(exporter: &Exporter) -> Result<usize, store::Error> {
    let mut conn = exporter.pool.acquire().await?;
    let orphans = exports::adopt(&mut conn, exporter.instance, ADOPT).await?;
    hand_over_again(exporter, &mut conn, orphans).await
}

/// Some time after a doubt, looks for batches of ours that nobody holds.
async fn take_up(exporter: &Exporter) -> Result<(), store::Error> {
    let doubted_at = *exporter.doubted_at.lock().unwrap_or_else(PoisonError::into_inner);
    if doubted_at.is_none_or(|at| at.elapsed() < DOUBT_SETTLES) {
        return Ok(());
    }
    let mut conn = exporter.pool.acquire().await?;
    let held: Vec<Uuid> = exporter.held.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
    let left = exports::left_behind(&mut conn, exporter.instance, &held, ADOPT).await?;
    if hand_over_again(exporter, &mut conn, left).await? == 0 {
        let mut latest = exporter.doubted_at.lock().unwrap_or_else(PoisonError::into_inner);
        latest.take_if(|latest| Some(*latest) == doubted_at);
    }
    Ok(())
}

async fn hand_over_again(
    exporter: &Exporter,
    conn: &mut PgConnection,
    orphans: Vec<Orphan>,
) -> Result<usize, store::Error> {
    let (mut derived, mut seen) = (HashMap::new(), HashSet::new());
    let mut orphans = orphans;
    let large = read_again(exporter, conn, &orphans, &mut seen, &mut derived).await?;
    if !large.is_empty() {
        let more = exports::adopt_of(conn, exporter.instance, &large, ADOPT_OF_LARGE).await?;
        read_again(exporter, conn, &more, &mut seen, &mut derived).await?;
        orphans.extend(more);
    }
    let found = orphans.len();
    for Orphan { batch_id, task_uuids, at } in orphans {
        let (mut again, mut read) = (Vec::new(), Vec::new());
        for task in task_uuids {
            match derived.get_mut(&task) {
                Some(Derived::At(times)) => again.extend(times.remove(&at)),
                Some(Derived::NotSampled) => read.push(task),
                // Retention has removed it.
                None => {}
            }
        }
        let spans: usize = again.iter().map(|task| task.spans.len()).sum();
        exporter.stats.re_exported.fetch_add(spans as u64, Ordering::Relaxed);
        exporter.hand_over(Batch { batch_id, at, slices: Vec::new(), read, derived: again });
    }
    Ok(found)
}

/// What is known of a task again: its spans are derived once, however many batches it has.
enum Derived {
    /// Its spans, by the transaction that settled them.
    At(HashMap<DateTime<Utc>, TaskSpans>),
    /// Its whole trace may be due with the batch of its end.
    NotSampled,
}

/// Derives the spans of the batches' tasks that were not seen yet; answers which tasks are large.
async fn read_again(
    exporter: &Exporter,
    conn: &mut PgConnection,
    orphans: &[Orphan],
    seen: &mut HashSet<Uuid>,
    derived: &mut HashMap<Uuid, Derived>,
) -> Result<Vec<Uuid>, store::Error> {
    let tasks: Vec<Uuid> =
        orphans.iter().flat_map(|orphan| orphan.task_uuids.iter().copied()).filter(|task| seen.insert(*task)).collect();
    let mut large = Vec::new();
    if tasks.is_empty() {
        return Ok(large);
    }
    for log in transitions::logs(conn, &tasks).await? {
        exporter.stats.recovered_logs.fetch_add(1, Ordering::Relaxed);
        let task = log.head.task_uuid;
        if log.transitions.len() > LARGE_TASK_ROWS {
            large.push(task);
        }
        let again = if is_sampled(&log.head) { Derived::At(by_settle(tree::spans(&log))) } else { Derived::NotSampled };
        derived.insert(task, again);
    }
    Ok(large)
}

/// The spans of a task, parted by the transaction that settled them.
fn by_settle(mut task: TaskSpans) -> HashMap<DateTime<Utc>, TaskSpans> {
    let mut times: HashMap<DateTime<Utc>, TaskSpans> = HashMap::new();
    for span in std::mem::take(&mut task.spans) {
        times.entry(span.settled_at).or_insert_with(|| task.clone()).spans.push(span);
    }
    times
}
