//! Reports results: what is there when the previous call returned goes out in
//! the next one, so an idle worker reports at once and a busy one in batches.
//!
//! A result leaves memory only when the database has answered for it, or the
//! worker's drain is over. Reporting twice is harmless: the token decides.

use std::sync::Arc;

use sqlx::PgPool;
use tasker_shared::store::Error;
use tasker_shared::store::outage::Outage;
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::connection::{Connection, backoff};
use crate::held::Held;
use crate::measure;
use crate::protocol::{self, Outcome, Report, ReportedError};

/// In one call.
const MAX_BATCH: usize = 500;
const MAX_BATCH_BYTES: usize = 4 << 20;
/// Calls in flight.
pub(crate) const REPORTERS: u32 = 2;
/// Unreported results beyond which nothing is claimed.
const MAX_WAITING: usize = 2_000;
const MAX_WAITING_BYTES: usize = 64 << 20;

/// Results that wait for the database.
#[derive(Debug, Clone, Copy, Default)]
struct Waiting {
    results: usize,
    bytes: usize,
}

/// Where attempts leave their results.
pub(crate) struct Results {
    sender: mpsc::UnboundedSender<Report>,
    waiting: watch::Sender<Waiting>,
}

/// Where reporters take them from.
pub(crate) type Inbox = Arc<Mutex<mpsc::UnboundedReceiver<Report>>>;

impl Results {
    pub(crate) fn new() -> (Arc<Self>, Inbox) {
        // Bounded by what may be claimed while results wait.
        let (sender, receiver) = mpsc::unbounded_channel();
        (Arc::new(Self { sender, waiting: watch::Sender::default() }), Arc::new(Mutex::new(receiver)))
    }

    pub(crate) fn push(&self, report: Report) {
        self.waiting.send_modify(|waiting| {
            waiting.results += 1;
            waiting.bytes += bytes(&report);
        });
        measure::waits();
        // The receiver lives as long as the worker runs.
        let _ = self.sender.send(report);
    }

    /// Waits until so few results wait that more work may be taken.
    pub(crate) async fn room(&self) {
        let few = |waiting: &Waiting| waiting.results < MAX_WAITING && waiting.bytes < MAX_WAITING_BYTES;
        // The sender is `self`, so it cannot be gone.
        let _ = self.waiting.subscribe().wait_for(few).await;
    }

    /// How many the database has not answered for.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.borrow().results
    }

    fn answered(&self, reports: &[Report]) {
        measure::waited(reports.len());
        self.waiting.send_modify(|waiting| {
            waiting.results -= reports.len();
            waiting.bytes -= reports.iter().map(bytes).sum::<usize>();
        });
    }
}

fn bytes(report: &Report) -> usize {
    let output = match &report.outcome {
        Outcome::Success { output } => output.get().len(),
        Outcome::Error { .. } => 0,
    };
    // Milestones and usage have a limit of their own.
    output + if report.milestones.is_some() { 16 << 10 } else { 0 }
}

/// One of the [`REPORTERS`].
pub(crate) struct Reporter {
    pub(crate) inbox: Inbox,
    pub(crate) results: Arc<Results>,
    pub(crate) held: Arc<Held>,
    /// No attempt will push any more.
    pub(crate) all_ran: CancellationToken,
    /// The drain is over; what the database has not taken by now is given up.
    pub(crate) give_up: CancellationToken,
}

impl Reporter {
    /// Reports until nothing comes any more, on a connection that commits synchronously.
    pub(crate) async fn run(self, pool: PgPool) {
        let outage = Outage::of(&pool);
        let mut connection = Connection::new(pool);
        while let Some(batch) = self.next_batch().await {
            if self.deliver(&mut connection, &outage, batch).await.is_none() {
                return;
            }
        }
    }

    async fn next_batch(&self) -> Option<Vec<Report>> {
        let mut inbox = self.inbox.lock().await;
        let first = tokio::select! {
            biased;
            first = inbox.recv() => first?,
            () = self.all_ran.cancelled() => return None,
        };
        // Attempts of one claim end together: let those that are ready to run come along.
        tokio::task::yield_now().await;
        let mut size = bytes(&first);
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH && size < MAX_BATCH_BYTES {
            let Ok(next) = inbox.try_recv() else { break };
            size += bytes(&next);
            batch.push(next);
        }
        Some(batch)
    }

    /// `None` if the worker gave up.
    async fn deliver(&self, connection: &mut Connection, outage: &Outage, batch: Vec<Report>) -> Option<()> {
        let mut parts = vec![batch];
        let (mut failures, mut logged) = (0, false);
        while let Some(mut part) = parts.pop() {
            match send(connection, &part).await {
                Ok(accepted) => {
                    outage.answered();
                    failures = 0;
                    if std::mem::take(&mut logged) {
                        tracing::info!("results are reported again");
                    }
                    measure::answered(&accepted);
                    for (report, _) in part.iter().zip(&accepted).filter(|(_, accepted)| !**accepted) {
                        tracing::info!(step_uuid = %report.step, "a result came too late: its claim is another's, or its task has ended");
                    }
                    self.answered(&part);
                }
                Err(error) if protocol::is_of_the_content(&error) => {
                    if part.len() > 1 {
                        let rest = part.split_off(part.len() / 2);
                        parts.extend([rest, part]);
                    } else if let Some((less, what)) = less(&part[0], &error) {
                        tracing::warn!(step_uuid = %part[0].step, %error, "the database refuses {what}");
                        self.results.push(less);
                        self.results.answered(&part);
                    } else {
                        tracing::error!(step_uuid = %part[0].step, %error, "the database refuses a report; its lease will expire");
                        self.answered(&part);
                    }
                }
                Err(error) => {
                    connection.broken();
                    measure::call_failed("report");
                    if !outage.handles(&error) && !logged {
                        logged = true;
                        tracing::warn!(%error, results = part.len(), "results cannot be reported; they are kept until the database takes them");
                    }
                    parts.push(part);
                    tokio::select! {
                        () = self.give_up.cancelled() => return None,
                        () = tokio::time::sleep(backoff(failures)) => failures += 1,
                    }
                }
            }
        }
        Some(())
    }

    fn answered(&self, reports: &[Report]) {
        self.held.remove(reports.iter().map(|report| &report.token));
        self.results.answered(reports);
    }
}

#[tracing::instrument(name = "report", skip_all, fields(results = reports.len()))]
async fn send(connection: &mut Connection, reports: &[Report]) -> Result<Vec<bool>, Error> {
    let reports: Vec<&Report> = reports.iter().collect();
    protocol::report_results(connection.get().await?, &reports).await
}

/// A refused report with less in it, and what was left out: first its milestones and usage, then
/// its output, for which the attempt counts as failed. `None` if there is nothing left to leave out.
fn less(report: &Report, error: &Error) -> Option<(Report, &'static str)> {
    if report.milestones.is_some() || report.usage.is_some() {
        let less = Report { milestones: None, usage: None, ..report.clone() };
        return Some((less, "milestones or usage; the attempt is reported without them"));
    }
    let Outcome::Success { .. } = report.outcome else {
        return None;
    };
    let code = match error {
        Error::Database(sqlx::Error::Database(error)) => error.code().unwrap_or_default().into_owned(),
        _ => String::new(),
    };
    let error = ReportedError {
        kind: "invalid_output".into(),
        message: format!("the database cannot store the output (SQLSTATE {code})"),
        retryable: false,
        retry_after_ms: None,
    };
    let failed = Report { outcome: Outcome::Error { error }, ..report.clone() };
    Some((failed, "an output; the attempt is reported as failed"))
}
