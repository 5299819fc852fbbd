//! Reading logs for their spans, a page at a time: a log is read where memory does not hold what a
//! settle wrote, which is when its writer is dead, when memory was full, or when the end of a task
//! cancelled what was never loaded.
//!
//! Whatever is asked for, no more than [`PAGE_ROWS`] rows of logs are in memory at once, but for what
//! one transaction moved of one task, and for the whole log of a task that was not sampled and is kept.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::store::{self, transitions};
use tasker_shared::trace::log::TaskLog;
use tasker_shared::trace::span::TaskSpans;
use tasker_shared::trace::tree;
use uuid::Uuid;

use super::log::{self, Size};
use super::sampling::{Kept, exported, is_within};
use super::{Exporter, Open, Worker};

/// Log rows that are read together.
const PAGE_ROWS: usize = 2000;
/// Of a log that is larger than a page, the moves are read whose rows are this many: each may bring
/// the earlier rows of the attempt that it closed.
const LARGE_LOG_ROWS: usize = PAGE_ROWS / 10;
/// Tasks whose sizes are asked for together.
const SIZES_AT_ONCE: usize = 1000;

/// What a transaction moved of a task, to be read from the log.
pub(super) struct Wanted {
    pub task: Uuid,
    pub at: DateTime<Utc>,
    pub open: Arc<Open>,
}

/// Reads until the database answers; `None` if the process stopped before.
macro_rules! retried {
    ($exporter:expr, |$conn:ident| $read:expr) => {{
        let mut wait = Duration::from_millis(50);
        loop {
            let read = async {
                let mut held = $exporter.pool.acquire().await?;
                let $conn = &mut *held;
                $read.await
            };
            match read.await {
                Ok(found) => break Some(found),
                Err(error) => {
                    if !wait_after(&$exporter, error, &mut wait).await {
                        break None;
                    }
                }
            }
        }
    }};
}

type OpenSlices = HashMap<Uuid, Vec<(DateTime<Utc>, Arc<Open>)>>;

impl Worker {
    /// Reads what is wanted and writes its spans. Answers `false` if the process stopped first.
    pub(super) async fn read(&mut self, wanted: Vec<Wanted>, again: bool) -> bool {
        let mut slices = OpenSlices::new();
        for Wanted { task, at, open } in wanted {
            slices.entry(task).or_default().push((at, open));
        }
        let tasks: Vec<Uuid> = slices.keys().copied().collect();
        let (mut whole, mut done) = (Vec::new(), true);
        for some in tasks.chunks(SIZES_AT_ONCE) {
            let Some(sizes) = retried!(self.exporter, |conn| log::sizes(conn, some)) else {
                return false;
            };
            // One that is not there was removed by retention.
            let (sampled, others): (Vec<Size>, Vec<Size>) = sizes.into_iter().partition(|size| size.is_sampled);
            whole.extend(others.into_iter().map(|size| (size.task, size.rows)));
            for page in pages(sampled.iter().map(|size| (size.task, size.rows))) {
                let is_large = sampled.iter().any(|size| page == [size.task] && size.rows > PAGE_ROWS);
                done &= if is_large {
                    self.read_large(page[0], &slices, again).await
                } else {
                    let times = page.iter().flat_map(|task| &slices[task]).map(|(at, _)| *at).collect();
                    self.read_slices(&page, times, &slices, again).await
                };
                if !done {
                    return false;
                }
            }
        }
        self.read_whole(whole, &slices, again).await
    }

    /// A log that does not fit into a page: a part of its transactions at a time.
    async fn read_large(&mut self, task: Uuid, slices: &OpenSlices, again: bool) -> bool {
        let times: Vec<DateTime<Utc>> = slices[&task].iter().map(|(at, _)| *at).collect();
        let counted = retried!(self.exporter, |conn| log::moves_at(conn, task, &times));
        let Some(counted) = counted else { return false };
        let (mut part, mut rows) = (Vec::new(), 0);
        for (at, moves) in counted {
            if rows > 0 && rows + moves > LARGE_LOG_ROWS {
                rows = 0;
                if !self.read_slices(&[task], std::mem::take(&mut part), slices, again).await {
                    return false;
                }
            }
            part.push(at);
            rows += moves;
        }
        part.is_empty() || self.read_slices(&[task], part, slices, again).await
    }

    /// What transactions at these times moved of these tasks.
    async fn read_slices(
        &mut self,
        tasks: &[Uuid],
        times: Vec<DateTime<Utc>>,
        slices: &OpenSlices,
        again: bool,
    ) -> bool {
        let read = retried!(self.exporter, |conn| transitions::slices(conn, tasks, &times));
        let Some(logs) = read else { return false };
        self.count_rows(logs.iter());
        let times: HashSet<DateTime<Utc>> = times.into_iter().collect();
        for log in logs {
            let mut settled = by_settle(tree::spans(&log), &times);
            for (at, open) in &slices[&log.head.task_uuid] {
                if let Some(spans) = settled.remove(at) {
                    self.write(open, &spans, again).await;
                }
            }
        }
        true
    }

    /// Logs of tasks that were not sampled: each goes out whole or not at all, and perhaps with those
    /// that it awaited.
    async fn read_whole(&mut self, tasks: Vec<(Uuid, usize)>, slices: &OpenSlices, again: bool) -> bool {
        let (mut awaited, mut written) = (Vec::new(), HashSet::new());
        for page in pages(tasks) {
            let Some(read) = retried!(self.exporter, |conn| logs(conn, &page)) else {
                return false;
            };
            self.count_rows(read.iter().map(|read| &read.log));
            for Read { log, kept, with } in read {
                let task = log.head.task_uuid;
                let With::Itself(others) = with else { continue };
                if let Some(spans) = exported(&log, kept.as_ref()) {
                    written.insert(task);
                    for (_, open) in &slices[&task] {
                        self.write(open, &spans, again).await;
                    }
                }
                let open = slices[&task].last().map(|(_, open)| open.clone());
                awaited.extend(others.into_iter().filter_map(|other| Some((other, open.clone()?))));
            }
        }
        awaited.retain(|(task, _)| written.insert(*task));
        for some in awaited.chunks(SIZES_AT_ONCE) {
            let opens: HashMap<Uuid, &Arc<Open>> = some.iter().map(|(task, open)| (*task, open)).collect();
            let ids: Vec<Uuid> = opens.keys().copied().collect();
            let Some(sizes) = retried!(self.exporter, |conn| log::sizes(conn, &ids)) else {
                return false;
            };
            for page in pages(sizes.into_iter().map(|size| (size.task, size.rows))) {
                let Some(read) = retried!(self.exporter, |conn| logs(conn, &page)) else {
                    return false;
                };
                self.count_rows(read.iter().map(|read| &read.log));
                for Read { log, kept, .. } in read {
                    if let Some(spans) = exported(&log, kept.as_ref()) {
                        self.write(opens[&log.head.task_uuid], &spans, again).await;
                    }
                }
            }
        }
        true
    }

    async fn write(&mut self, open: &Arc<Open>, spans: &TaskSpans, again: bool) {
        if again {
            self.exporter.stats.re_exported.fetch_add(spans.spans.len() as u64, Ordering::Relaxed);
        }
        self.push(open, spans).await;
    }

    fn count_rows<'a>(&self, logs: impl Iterator<Item = &'a TaskLog>) {
        let rows = logs.map(|log| log.transitions.len()).sum();
        self.exporter.stats.most_rows_read.fetch_max(rows, Ordering::Relaxed);
    }
}

/// Tasks whose logs fit into a page together; a log that is larger than a page has one of its own.
fn pages(tasks: impl IntoIterator<Item = (Uuid, usize)>) -> Vec<Vec<Uuid>> {
    let (mut pages, mut rows): (Vec<Vec<Uuid>>, usize) = (Vec::new(), 0);
    for (task, size) in tasks {
        match pages.last_mut() {
            Some(page) if rows + size <= PAGE_ROWS => page.push(task),
            _ => {
                pages.push(vec![task]);
                rows = 0;
            }
        }
        rows += size;
    }
    pages
}

/// The spans that transactions at these times settled, parted by them.
fn by_settle(mut task: TaskSpans, times: &HashSet<DateTime<Utc>>) -> HashMap<DateTime<Utc>, TaskSpans> {
    let mut parted: HashMap<DateTime<Utc>, TaskSpans> = HashMap::new();
    for span in std::mem::take(&mut task.spans).into_iter().filter(|span| times.contains(&span.settled_at)) {
        parted.entry(span.settled_at).or_insert_with(|| task.clone()).spans.push(span);
    }
    parted
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

async fn logs(conn: &mut PgConnection, task_uuids: &[Uuid]) -> Result<Vec<Read>, store::Error> {
    let logs = transitions::logs(conn, task_uuids).await?;
    let mut kept = log::kept(conn, &logs).await?;
    let mut read = Vec::with_capacity(logs.len());
    for log in logs {
        let task = log.head.task_uuid;
        let kept = kept.remove(&task);
        let with = match &kept {
            Some(_) if !is_within(&log.head) => With::Itself(transitions::awaited_below(conn, task, i64::MAX).await?),
            Some(_) if log::is_noted(conn, task).await? => With::Topmost,
            _ => With::Itself(Vec::new()),
        };
        read.push(Read { log, kept, with });
    }
    Ok(read)
}

/// Waits after a failed read, ever longer; `false` if the process stops.
async fn wait_after(exporter: &Exporter, error: store::Error, wait: &mut Duration) -> bool {
    if !exporter.is_outage(&error) {
        tracing::warn!(%error, "the log of a task could not be read for its trace; trying again");
    }
    tokio::select! {
        () = exporter.done.cancelled() => false,
        () = tokio::time::sleep(*wait) => {
            *wait = (*wait * 2).min(Duration::from_secs(5));
            true
        }
    }
}
