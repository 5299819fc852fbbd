//! Delivery: what a settle hands over is encoded, sent, acknowledged, and only then forgotten.
//!
//! Export never blocks work: the queue is bounded, and what does not fit is released in the
//! database for a later recovery. A row of `export_batches` is deleted only after a receiver
//! took its spans, or set aside once a receiver refused them for good; the rows of a dead
//! orchestrator are adopted and derived again from the log, a page of it at a time.

pub mod batches;
pub mod log;
mod parcel;
mod reading;
pub mod sampling;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tasker_shared::metrics::{Stats, metrics};
use tasker_shared::redact;
use tasker_shared::state_machine::duration::LONGEST;
use tasker_shared::store;
use tasker_shared::store::outage::Outage;
use tasker_shared::trace::config::TraceConfig;
use tasker_shared::trace::log::{Attempt, TaskLog};
use tasker_shared::trace::otlp::{Encoder, ServiceNames};
use tasker_shared::trace::span::{Service, TaskSpans};
use tasker_shared::trace::transport::{self, Accepted, Error as TransportError, SendError, Transport};
use tasker_shared::trace::tree;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::batches::Orphan;
pub use self::parcel::split;
use self::parcel::{Owners, Parcel};
use self::reading::Wanted;

/// Log rows held in memory at most; about 100 MB when full.
const MAX_QUEUED_ROWS: usize = 200_000;
/// A request is closed at this many spans or bytes: collectors refuse more than 4 MiB.
const MAX_REQUEST_SPANS: usize = 4096;
const MAX_REQUEST_BYTES: usize = 2 * 1024 * 1024;
/// Requests are not made smaller than this beforehand, whatever a receiver refused.
const LEAST_REQUEST_BYTES: usize = 16 * 1024;
/// Requests on their way at one time.
const MAX_IN_FLIGHT: usize = 4;
/// Batches adopted in one go, and how often dead owners are looked for.
const ADOPT: i64 = 200;
const ADOPT_EVERY: Duration = Duration::from_secs(10);
const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// How often what was set aside is looked through for tasks that retention has removed.
const FORGET_EVERY: Duration = Duration::from_hours(1);
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
}

/// What waits for the worker.
#[derive(Debug)]
enum Given {
    /// From a settle of this process.
    Batch(Batch),
    /// Rows that nobody held: their logs are read again.
    Orphans(Vec<Orphan>),
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
    sender: mpsc::UnboundedSender<Given>,
    /// Batches handed over and not yet settled.
    held: Arc<Mutex<HashSet<Uuid>>>,
    /// When rows of ours may last have been left in the database without our knowledge.
    doubted_at: Arc<Mutex<Option<Instant>>>,
    stats: Arc<Stats>,
    /// A request is closed at this many bytes: fewer once a receiver has refused one as too large.
    request_bytes: Arc<AtomicUsize>,
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
        batches::alive(&mut *pool.acquire().await.map_err(store::Error::from)?, instance).await?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let exporter = Self {
            instance,
            sender,
            held: Arc::default(),
            doubted_at: Arc::default(),
            stats: Arc::default(),
            request_bytes: Arc::new(AtomicUsize::new(MAX_REQUEST_BYTES)),
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
            owners: Default::default(),
            request: 1,
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
        // Another receiver may take larger ones.
        self.request_bytes.store(MAX_REQUEST_BYTES, Ordering::Relaxed);
        tokio::spawn(self.clone().probe(config.clone()));
        Ok(())
    }

    fn target(&self) -> Arc<Target> {
        self.target.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a receiver is there at all, so that a missing one is reported before the first span.
    async fn probe(self, config: TraceConfig) {
        if let Some(Err(error)) = self.stop.run_until_cancelled(transport::reach(&config)).await {
            self.is_away(&error);
        }
    }

    /// A request was taken.
    fn took(&self, spans: usize, accepted: &Accepted) {
        self.stats.exported.fetch_add(spans as u64, Ordering::Relaxed);
        self.stats.rejected.fetch_add(accepted.rejected_spans, Ordering::Relaxed);
        if accepted.rejected_spans > 0 || accepted.message.is_some() {
            let said = accepted.message.as_deref().unwrap_or("it did not say why");
            if self.stats.rejected_because.hear(said, said) {
                let reason = redact::clipped(said, 400);
                tracing::warn!(
                    spans = accepted.rejected_spans,
                    reason,
                    "the receiver of traces dropped spans that it took, or warns"
                );
            }
        }
        self.stats.failing.store(false, Ordering::Relaxed);
        if self.stats.problem.forget() {
            tracing::info!("the receiver of traces answers again");
        }
    }

    /// Said again only when the reason becomes another.
    fn is_away(&self, error: &SendError) {
        self.stats.failing.store(true, Ordering::Relaxed);
        if self.stats.problem.hear(&error.sort(), &error.to_string()) {
            tracing::warn!(%error, "spans wait: the receiver of traces did not take them; work goes on");
        }
    }

    /// These spans will never be taken.
    fn refused(&self, part: &Parcel, error: &SendError) {
        self.stats.set_aside.fetch_add(part.spans() as u64, Ordering::Relaxed);
        if self.stats.set_aside_because.hear(&error.sort(), &error.to_string()) {
            tracing::warn!(%error, "spans are set aside: the receiver of traces refused them for good; `tasker trace replay --refused` sends them again");
        }
        part.refuse(&redact::clipped(&error.to_string(), 400));
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
        let _ = self.sender.send(Given::Batch(batch));
    }

    /// Hands over rows of the database that nobody held in memory. Whoever calls has looked for room.
    fn take_over(&self, orphans: Vec<Orphan>) {
        let rows = orphans.iter().map(|orphan| orphan.task_uuids.len()).sum();
        self.stats.queued_rows.fetch_add(rows, Ordering::Relaxed);
        self.stats.open_batches.fetch_add(orphans.len(), Ordering::Relaxed);
        let ids = orphans.iter().map(|orphan| orphan.batch_id);
        self.held.lock().unwrap_or_else(PoisonError::into_inner).extend(ids);
        let _ = self.sender.send(Given::Orphans(orphans));
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
            let _ = batches::gone(&mut conn, self.instance).await;
        }
        self.done.cancel();
    }

    /// Whether an error is one of a database that is away, which is logged once for the whole process.
    fn is_outage(&self, error: &store::Error) -> bool {
        Outage::of(&self.pool).handles(error)
    }

    fn release(&self, batch_ids: Vec<Uuid>) {
        self.stats.released.fetch_add(batch_ids.len() as u64, Ordering::Relaxed);
        let exporter = self.clone();
        tokio::spawn(async move {
            let released = async { batches::release(&mut *exporter.pool.acquire().await?, &batch_ids).await }.await;
            if let Err(error) = released {
                if !exporter.is_outage(&error) {
                    tracing::warn!(%error, "export batches could not be released; they are taken up again later");
                }
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
    batch.slices.iter().map(|slice| slice.transitions.len() + reported(slice)).sum::<usize>() + batch.read.len()
}

/// Milestones that handlers reported, as rows of the same size.
fn reported(slice: &TaskLog) -> usize {
    const EVENTS_A_ROW: usize = 2;
    let events =
        |attempt: &Attempt| attempt.milestones.as_ref().and_then(serde_json::Value::as_array).map_or(0, Vec::len);
    slice.attempts.iter().map(events).sum::<usize>() * EVENTS_A_ROW
}

/// A batch that is not yet acknowledged: it may span several requests, or be one of many in one.
#[derive(Debug)]
struct Open {
    batch_id: Uuid,
    at: DateTime<Utc>,
    rows: usize,
    /// Requests that hold spans of it, and one for as long as it is being encoded.
    requests: AtomicUsize,
    /// The number of the request that it was last put into.
    last: AtomicU64,
    /// How many of its spans were refused for good, and why the last of them.
    refused: Mutex<Option<(usize, String)>>,
}

impl Open {
    fn new(batch_id: Uuid, at: DateTime<Utc>, rows: usize) -> Arc<Self> {
        let refused = Mutex::default();
        Arc::new(Self { batch_id, at, rows, requests: AtomicUsize::new(1), last: AtomicU64::new(0), refused })
    }
}

struct Worker {
    encoder: Encoder,
    /// What the encoder had cleaned before the open request.
    cleaned: u64,
    /// Those that the encoder writes.
    names: ServiceNames,
    /// Batches of the request that is being filled.
    open: Vec<Arc<Open>>,
    /// Whose its spans are, for each service in the order in which they were written.
    owners: [Owners; 2],
    /// Its number.
    request: u64,
    slots: Arc<Semaphore>,
    exporter: Exporter,
}

impl Worker {
    async fn run(mut self, mut receiver: mpsc::UnboundedReceiver<Given>) {
        loop {
            let given = tokio::select! {
                () = self.exporter.stop.cancelled() => return,
                given = receiver.recv() => given,
            };
            let Some(given) = given else { return };
            if !self.encode(given).await {
                return;
            }
            while let Ok(given) = receiver.try_recv() {
                if !self.encode(given).await {
                    return;
                }
            }
            self.send().await;
        }
    }

    /// Answers `false` if the process stopped first: then the rows stay for whoever recovers.
    async fn encode(&mut self, given: Given) -> bool {
        let (mut opened, mut wanted) = (Vec::new(), Vec::new());
        let again = matches!(given, Given::Orphans(_));
        match given {
            Given::Batch(batch) => {
                let at = batch.at;
                let open = Open::new(batch.batch_id, at, rows(&batch));
                // One after another: a batch may hold the logs of hundreds of tasks.
                for slice in &batch.slices {
                    let mut task = tree::spans(slice);
                    task.spans.retain(|span| span.settled_at == at);
                    self.push(&open, &task).await;
                }
                wanted.extend(batch.read.into_iter().map(|task| Wanted { task, at, open: open.clone() }));
                opened.push(open);
            }
            Given::Orphans(orphans) => {
                for Orphan { batch_id, task_uuids, at } in orphans {
                    let open = Open::new(batch_id, at, task_uuids.len());
                    wanted.extend(task_uuids.into_iter().map(|task| Wanted { task, at, open: open.clone() }));
                    opened.push(open);
                }
            }
        }
        if !wanted.is_empty() && !self.read(wanted, again).await {
            return false;
        }
        for open in opened {
            // One without spans goes with the request that is open, which costs no statement of its own.
            self.enter(&open);
            open.requests.fetch_sub(1, Ordering::AcqRel);
        }
        if self.encoder.spans() == 0 {
            // Nothing of them is in the open request: they count as sent.
            let open = std::mem::take(&mut self.open);
            self.request += 1;
            settle(&self.exporter, open).await;
        }
        true
    }

    /// Puts a batch into the open request, if it is not there already.
    fn enter(&mut self, open: &Arc<Open>) {
        if open.last.swap(self.request, Ordering::Relaxed) != self.request {
            open.requests.fetch_add(1, Ordering::AcqRel);
            self.open.push(open.clone());
        }
    }

    /// Writes spans into the open request, and into others after it if they do not fit.
    async fn push(&mut self, open: &Arc<Open>, spans: &TaskSpans) {
        let mut next = 0;
        while next < spans.spans.len() {
            let most = self.exporter.request_bytes.load(Ordering::Relaxed);
            self.enter(open);
            let first = next;
            next = self.encoder.push_from(spans, first, most);
            for span in &spans.spans[first..next] {
                let owners = &mut self.owners[usize::from(span.service == Service::Worker)];
                match owners.last_mut() {
                    Some((last, n)) if Arc::ptr_eq(last, open) => *n += 1,
                    _ => owners.push((open.clone(), 1)),
                }
            }
            if self.encoder.spans() >= MAX_REQUEST_SPANS || self.encoder.bytes_len() >= most {
                // What is left goes on in the next request: the batch is done when both are acknowledged.
                self.send().await;
            }
        }
    }

    /// Closes the open request and sends it in the background, a few at a time.
    async fn send(&mut self) {
        if self.encoder.spans() == 0 {
            return;
        }
        let cleaned = self.encoder.cleaned();
        self.exporter.stats.cleaned.fetch_add(cleaned - self.cleaned, Ordering::Relaxed);
        self.cleaned = cleaned;
        let [mut owners, of_workers] = std::mem::take(&mut self.owners);
        owners.extend(of_workers);
        let parcel = Parcel::new(self.encoder.finish(), owners);
        let target = self.exporter.target();
        if target.names != self.names {
            self.names = target.names.clone();
            self.encoder = Encoder::new(&self.names);
            self.cleaned = 0;
        }
        let open = std::mem::take(&mut self.open);
        self.request += 1;
        let Ok(slot) = self.slots.clone().acquire_owned().await else {
            return;
        };
        let exporter = self.exporter.clone();
        tokio::spawn(async move {
            let newest = open.iter().map(|open| open.at).max().unwrap_or_default();
            if parcel::deliver(&exporter, parcel, newest).await {
                settle(&exporter, open).await;
            }
            drop(slot);
        });
    }
}

/// One request of each of these batches is dealt with; those with none left are forgotten, or set
/// aside if anything of them was refused.
async fn settle(exporter: &Exporter, open: Vec<Arc<Open>>) {
    let done: Vec<Arc<Open>> =
        open.into_iter().filter(|open| open.requests.fetch_sub(1, Ordering::AcqRel) == 1).collect();
    if done.is_empty() {
        return;
    }
    let (mut delivered, mut refused) = (Vec::with_capacity(done.len()), Vec::new());
    for open in &done {
        match open.refused.lock().unwrap_or_else(PoisonError::into_inner).take() {
            None => delivered.push(open.batch_id),
            Some((spans, reason)) => refused.push((open.batch_id, i32::try_from(spans).unwrap_or(i32::MAX), reason)),
        }
    }
    let kept = async {
        let mut conn = exporter.pool.acquire().await?;
        if !refused.is_empty() {
            batches::refuse(&mut conn, &refused).await?;
        }
        if delivered.is_empty() { Ok(()) } else { batches::delete(&mut conn, &delivered).await }
    };
    if let Err(error) = kept.await {
        if !exporter.is_outage(&error) {
            tracing::warn!(%error, "acknowledged export batches stay in the database; their spans are sent once more");
        }
        exporter.doubt();
    }
    {
        let mut held = exporter.held.lock().unwrap_or_else(PoisonError::into_inner);
        for open in &done {
            held.remove(&open.batch_id);
        }
    }
    let rows = done.iter().map(|open| open.rows).sum();
    exporter.stats.queued_rows.fetch_sub(rows, Ordering::Relaxed);
    exporter.stats.open_batches.fetch_sub(done.len(), Ordering::Relaxed);
}

/// Says that this instance lives, and adopts what dead ones left.
async fn recover(exporter: Exporter) {
    let (mut last_adopted, mut after) = (None::<Instant>, None);
    let mut forgotten = Instant::now();
    loop {
        if let Ok(mut conn) = exporter.pool.acquire().await
            && let Err(error) = batches::alive(&mut conn, exporter.instance).await
            && !exporter.is_outage(&error)
        {
            tracing::warn!(%error, "this orchestrator could not say that it lives");
        }
        let has_room = exporter.stats.queued_rows.load(Ordering::Relaxed) < MAX_QUEUED_ROWS / 2;
        if has_room && last_adopted.is_none_or(|at| at.elapsed() >= ADOPT_EVERY) {
            match adopt(&exporter, after).await {
                // There may be more: look again at once, from where this look ended.
                Ok(last) => (last_adopted, after) = (last.is_none().then(Instant::now), last),
                Err(error) => {
                    // Not at once: 50 tries a second would not bring it back.
                    last_adopted.get_or_insert_with(Instant::now);
                    if !exporter.is_outage(&error) {
                        tracing::warn!(%error, "export batches could not be adopted");
                    }
                }
            }
        }
        if let Err(error) = take_up(&exporter).await
            && !exporter.is_outage(&error)
        {
            tracing::warn!(%error, "export batches that were left behind could not be read");
        }
        if forgotten.elapsed() >= FORGET_EVERY {
            forgotten = Instant::now();
            let gone = async { batches::forget_removed(&mut *exporter.pool.acquire().await?).await }.await;
            if let Err(error) = gone {
                tracing::debug!(%error, "what was set aside could not be looked through");
            }
        }
        let pause = if last_adopted.is_some() { ALIVE_EVERY } else { Duration::from_millis(20) };
        tokio::select! {
            () = exporter.stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Takes over orphaned batches from this time on; answers the time of the newest, if there are any.
async fn adopt(exporter: &Exporter, after: Option<DateTime<Utc>>) -> Result<Option<DateTime<Utc>>, store::Error> {
    let mut conn = exporter.pool.acquire().await?;
    let orphans = batches::adopt(&mut conn, exporter.instance, after, ADOPT).await?;
    let newest = orphans.iter().map(|orphan| orphan.at).max();
    if newest.is_some() {
        exporter.take_over(orphans);
    }
    Ok(newest)
}

/// Some time after a doubt, looks for batches of ours that nobody holds.
async fn take_up(exporter: &Exporter) -> Result<(), store::Error> {
    let doubted_at = *exporter.doubted_at.lock().unwrap_or_else(PoisonError::into_inner);
    if doubted_at.is_none_or(|at| at.elapsed() < DOUBT_SETTLES) {
        return Ok(());
    }
    let mut conn = exporter.pool.acquire().await?;
    let held: Vec<Uuid> = exporter.held.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
    let left = batches::left_behind(&mut conn, exporter.instance, &held, ADOPT).await?;
    if left.is_empty() {
        let mut latest = exporter.doubted_at.lock().unwrap_or_else(PoisonError::into_inner);
        latest.take_if(|latest| Some(*latest) == doubted_at);
    } else {
        exporter.take_over(left);
    }
    Ok(())
}
