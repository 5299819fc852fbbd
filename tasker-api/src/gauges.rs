//! What only the database knows, read when somebody asks.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use sqlx::PgPool;
use tokio::sync::Mutex;

use tasker_shared::metrics::metrics;
use tasker_shared::store::{self, views};

/// What was read is shown again for this long.
const FRESH: Duration = Duration::from_secs(5);
/// A database that is busy must not keep the scraper waiting.
const PATIENCE: Duration = Duration::from_secs(4);

/// Answers scrapes of one process.
#[derive(Debug, Clone)]
pub struct Scrape(Option<Arc<Database>>);

#[derive(Debug)]
struct Database {
    pool: PgPool,
    read: Mutex<Read>,
}

#[derive(Debug)]
struct Read {
    at: Option<Instant>,
    registry: Registry,
    gauges: Gauges,
}

impl Scrape {
    /// With a pool, also what only the database knows; its role must own the schema. Workers have
    /// none: what they may not read, orchestrators tell.
    pub fn new(pool: Option<PgPool>) -> Self {
        Self(pool.map(|pool| {
            let mut registry = Registry::default();
            let gauges = Gauges::new(&mut registry);
            Arc::new(Database { pool, read: Mutex::new(Read { at: None, registry, gauges }) })
        }))
    }

    /// What [`serve`](tasker_shared::metrics::serve) asks at each scrape.
    pub fn served(self) -> impl Fn() -> Pin<Box<dyn Future<Output = String> + Send>> + Clone + Send + Sync + 'static {
        move || {
            let scrape = self.clone();
            Box::pin(async move { scrape.text().await })
        }
    }

    /// Everything this process knows, as `OpenMetrics` text of type [`CONTENT_TYPE`](tasker_shared::metrics::CONTENT_TYPE).
    /// A database that does not answer costs its own numbers and sets `tasker_database_up` to 0.
    pub async fn text(&self) -> String {
        let mut text = String::with_capacity(16 << 10);
        // Writing to a String cannot fail.
        let _ = metrics().write(&mut text);
        if let Some(database) = &self.0 {
            // Scrapes at the same moment read once.
            let mut read = database.read.lock().await;
            if read.at.is_none_or(|at| at.elapsed() >= FRESH) {
                let answer = tokio::time::timeout(PATIENCE, read.gauges.read(&database.pool)).await;
                read.gauges.up.set(i64::from(matches!(answer, Ok(Ok(())))));
                match answer {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "the gauges of the database could not be read"),
                    Err(_) => tracing::debug!("the gauges of the database were not read in time"),
                }
                read.at = Some(Instant::now());
            }
            let _ = encode_registry(&mut text, &read.registry);
        }
        let _ = encode_eof(&mut text);
        text
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfQueue {
    queue: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNamespace {
    namespace: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTable {
    what: String,
}

type ByQueue = Family<OfQueue, Gauge>;

#[derive(Debug)]
struct Gauges {
    up: Gauge,
    messages: ByQueue,
    visible: ByQueue,
    oldest: ByQueue,
    held: ByQueue,
    workers: ByQueue,
    quarantined: ByQueue,
    paused: ByQueue,
    live_workers: Family<OfNamespace, Gauge>,
    live_slots: Family<OfNamespace, Gauge>,
    unusable: Family<OfNamespace, Gauge>,
    ages: Family<OfTable, Gauge<f64, std::sync::atomic::AtomicU64>>,
    lag: Gauge<f64, std::sync::atomic::AtomicU64>,
    set_aside: Gauge,
    counted: Family<OfTable, Gauge>,
}

impl Gauges {
    fn new(registry: &mut Registry) -> Self {
        let mut by_queue = |name: &str, help: &str, unit: Option<Unit>| {
            let family = ByQueue::default();
            match unit {
                Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
                None => registry.register(name, help, family.clone()),
            }
            family
        };
        let messages = by_queue("tasker_queue_messages", "Messages in a queue, hidden ones included", None);
        let visible = by_queue("tasker_queue_visible_messages", "Messages that may be read now", None);
        let oldest = by_queue("tasker_queue_oldest_age", "Age of the oldest message", Some(Unit::Seconds));
        let held = by_queue("tasker_queue_held_steps", "Ready steps that are held back from a queue", None);
        let workers = by_queue("tasker_queue_workers", "Live workers that read a queue", None);
        let quarantined = by_queue("tasker_quarantined_messages", "Messages of a queue in quarantine", None);
        let paused = by_queue("tasker_queue_paused", "Whether an operator paused a queue", None);
        let (up, lag, set_aside) = (Gauge::default(), Gauge::default(), Gauge::default());
        let (live_workers, live_slots, ages) = (Family::default(), Family::default(), Family::default());
        let unusable = Family::default();
        registry.register(
            "tasker_workers_unusable",
            "Workers seen within 30 s that named no handler, or queues or slots that cannot be counted",
            unusable.clone(),
        );
        registry.register("tasker_workers", "Workers seen within 30 s", live_workers.clone());
        registry.register("tasker_workers_slots", "Attempts that live workers may run at once", live_slots.clone());
        registry.register_with_unit(
            "tasker_oldest_row_age",
            "Age of the oldest row that retention, export or the sweep has to remove",
            Unit::Seconds,
            ages.clone(),
        );
        registry.register_with_unit(
            "tasker_otlp_lag",
            "Age of the oldest spans that no receiver has acknowledged",
            Unit::Seconds,
            lag.clone(),
        );
        registry.register(
            "tasker_otlp_batches_set_aside",
            "Batches with spans that a receiver refused for good, 10,000 at most",
            set_aside.clone(),
        );
        let counted = Family::default();
        registry.register(
            "tasker_counted",
            "Rare things that the database counts, since it was set up: malformed trace context, reports of lost claims",
            counted.clone(),
        );
        registry.register("tasker_database_up", "Whether the database answered this process's last scrape", up.clone());
        Self {
            up,
            messages,
            visible,
            oldest,
            held,
            workers,
            quarantined,
            paused,
            live_workers,
            live_slots,
            unusable,
            ages,
            lag,
            set_aside,
            counted,
        }
    }

    /// What is not known is not said.
    fn forget(&self) {
        for family in
            [&self.messages, &self.visible, &self.oldest, &self.held, &self.workers, &self.quarantined, &self.paused]
        {
            family.clear();
        }
        self.live_workers.clear();
        self.live_slots.clear();
        self.unusable.clear();
        self.ages.clear();
    }

    async fn read(&self, pool: &PgPool) -> Result<(), store::Error> {
        self.forget();
        let mut conn = pool.acquire().await?;
        let queues = views::queues(&mut conn).await?;
        let workers = views::live_workers(&mut conn).await?;
        let oldest = oldest_rows(&mut conn).await?;
        self.set_aside.set(count_set_aside(&mut conn).await?);
        for (what, n) in views::counters(&mut conn).await? {
            self.counted.get_or_create(&OfTable { what }).set(n);
        }
        for queue in queues {
            let of = OfQueue { queue: queue.queue };
            let of_workers = of.queue.starts_with("worker_");
            self.messages.get_or_create(&of).set(queue.depth);
            self.visible.get_or_create(&of).set(queue.visible);
            self.oldest.get_or_create(&of).set(queue.oldest_s.unwrap_or(0).into());
            self.quarantined.get_or_create(&of).set(queue.quarantined);
            if of_workers {
                self.held.get_or_create(&of).set(queue.held);
                self.workers.get_or_create(&of).set(queue.workers);
                self.paused.get_or_create(&of).set(queue.paused.is_some().into());
            }
        }
        for live in workers {
            let of = OfNamespace { namespace: live.namespace };
            self.live_workers.get_or_create(&of).set(live.workers);
            self.unusable.get_or_create(&of).set(live.unusable);
            self.live_slots.get_or_create(&of).set(live.slots);
        }
        self.lag.set(0.0);
        for row in oldest {
            if row.what == "export_batches" {
                self.lag.set(row.age_s.max(0.0));
            }
            self.ages.get_or_create(&OfTable { what: row.what }).set(row.age_s);
        }
        Ok(())
    }
}

/// Batches that are set aside, 10,000 at most.
async fn count_set_aside(conn: &mut sqlx::PgConnection) -> Result<i64, store::Error> {
    Ok(sqlx::query_scalar!(r#"select count(*) as "batches!" from (select from tasker.refused_exports limit 10000) r"#)
        .fetch_one(conn)
        .await?)
}

/// The oldest row of a table that grows or drains: see `tasker.oldest_rows`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct OldestRow {
    /// A table.
    pub what: String,
    /// When that row was made.
    pub oldest_at: chrono::DateTime<chrono::Utc>,
    /// How long ago.
    pub age_s: f64,
}

/// How old the oldest row of each table is, for a metric.
pub async fn oldest_rows(conn: &mut sqlx::PgConnection) -> Result<Vec<OldestRow>, store::Error> {
    Ok(sqlx::query_as!(
        OldestRow,
        r#"select what as "what!", oldest_at as "oldest_at!", age_s as "age_s!" from tasker.oldest_rows()"#
    )
    .fetch_all(conn)
    .await?)
}
