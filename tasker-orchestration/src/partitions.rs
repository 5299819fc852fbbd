//! The weekly tables of the log, made ahead of their weeks.

use std::time::{Duration, Instant};

use sqlx::PgConnection;
use tasker_shared::store::Error;

use crate::lifecycle::{Shared, limits};

/// Between two looks at the weeks of the log: they are made four weeks ahead.
const CHECK_PARTITIONS: Duration = Duration::from_hours(6);
/// The same when a lock was in the way.
const CHECK_PARTITIONS_AGAIN: Duration = Duration::from_mins(2);
/// When the sweep looks at the weeks of the log again, and whether it has said that one is missing.
#[derive(Debug)]
pub(crate) struct Partitions {
    next: Instant,
    missing: bool,
}

impl Partitions {
    /// That looks at once.
    pub(crate) fn new() -> Self {
        Self { next: Instant::now(), missing: false }
    }

    /// Makes the weeks that are missing, and forgets limits out of use, if it is time for it. What does
    /// not succeed is no reason to let the sweep wait: the next look is soon, and weeks ahead of the need.
    pub(crate) async fn look(&mut self, shared: &Shared, conn: &mut PgConnection) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + CHECK_PARTITIONS_AGAIN;
        match ensure_partitions(conn).await {
            Ok(true) => {
                if std::mem::take(&mut self.missing) {
                    tracing::info!("the coming weeks of the log have their tables now");
                }
                self.next = Instant::now() + CHECK_PARTITIONS;
            }
            Ok(false) => {
                shared.locks.met_for_tables();
                if !std::mem::replace(&mut self.missing, true) {
                    tracing::warn!(
                        "a coming week of the log has no table yet: somebody reads the default part of the log in a \
                         transaction that stays open, as a dump does; trying again every two minutes"
                    );
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.missing, true) {
                    tracing::warn!(%error, "the coming weeks of the log could not get their tables; trying again every two minutes");
                }
            }
        }
        loop {
            match limits::forget_limits(conn).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "limits out of use could not be forgotten; they are looked at again");
                    break;
                }
            }
        }
    }
}

/// Makes the partitions of the coming weeks; false if a lock was in the way.
async fn ensure_partitions(conn: &mut PgConnection) -> Result<bool, Error> {
    let made = sqlx::query_scalar!(r#"select tasker.ensure_partitions() as "made!""#).fetch_one(conn).await?;
    Ok(made >= 0)
}
