//! The claims this worker holds, and the heartbeats that keep them.
//!
//! A claim is held from the moment it arrives until its report was answered.
//! Claims that end within a third of their lease never cost a heartbeat, and
//! with nothing held nothing is sent.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::PgPool;
use tasker_shared::payload;
use tasker_shared::store::outage::Outage;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::connection::{Connection, backoff};
use crate::measure;
use crate::protocol::{self, Beat, Claim, Renewal};

/// A template with a lease of nothing must not make the loop spin.
const SHORTEST: Duration = Duration::from_millis(20);
/// Of a progress; the database takes no more either.
const MAX_PROGRESS_BYTES: usize = 4096;

/// How a running handler is asked to stop.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    /// The handler's own token: please stop.
    pub(crate) cancel: CancellationToken,
    /// The claim is gone: nobody wants a result any more.
    pub(crate) gone: CancellationToken,
}

struct HeldClaim {
    step: Uuid,
    every: Duration,
    due: Instant,
    progress: Option<Value>,
    stop: Stop,
}

#[derive(Default)]
struct Claims {
    by_token: HashMap<Uuid, HeldClaim>,
    /// When the heartbeat loop will look next.
    looks_at: Option<Instant>,
}

/// The claims this worker holds.
#[derive(Default)]
pub(crate) struct Held {
    claims: Mutex<Claims>,
    /// Something is due earlier than the loop knows.
    earlier: Notify,
    /// Ask for all claims now.
    now: Notify,
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, Claims> {
        // Nothing in here leaves the map half changed.
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, claims: &[Claim], received: Instant) -> Vec<Stop> {
        let mut held = self.lock();
        let mut stops = Vec::with_capacity(claims.len());
        for claim in claims {
            let every = (Duration::from_millis(u64::try_from(claim.lease_ms).unwrap_or(0)) / 3).max(SHORTEST);
            let (stop, due) = (Stop::default(), received + every);
            stops.push(stop.clone());
            held.by_token.insert(claim.token, HeldClaim { step: claim.step, every, due, progress: None, stop });
            if held.looks_at.is_none_or(|looks_at| due < looks_at) {
                held.looks_at = Some(due);
                self.earlier.notify_one();
            }
        }
        stops
    }

    pub(crate) fn remove<'t>(&self, tokens: impl IntoIterator<Item = &'t Uuid>) {
        let mut held = self.lock();
        for token in tokens {
            held.by_token.remove(token);
        }
    }

    /// Keeps it for the next heartbeat. What the database would not take is never sent: it would fail
    /// the call that keeps all other leases.
    pub(crate) fn note_progress(&self, token: Uuid, mut progress: Value) -> Result<(), &'static str> {
        if let Some(why) = payload::problem(&progress).filter(|why| why.starts_with("nests")) {
            return Err(why);
        }
        payload::clean(&mut progress);
        if progress.to_string().len() > MAX_PROGRESS_BYTES {
            return Err("has more than 4096 bytes");
        }
        if let Some(claim) = self.lock().by_token.get_mut(&token) {
            claim.progress = Some(progress);
        }
        Ok(())
    }

    /// Asks for all claims at once: one of them was cancelled, or we may have missed that.
    pub(crate) fn beat_now(&self) {
        self.now.notify_one();
    }

    /// Drops all handlers without a report: their leases will expire.
    pub(crate) fn give_up_all(&self) {
        for (_, claim) in self.lock().by_token.drain() {
            claim.stop.gone.cancel();
        }
    }

    /// What is due at `now`; a little early ones come along, so that claims of one moment share a call.
    fn due(&self, now: Instant, all: bool) -> Vec<Beat> {
        self.lock()
            .by_token
            .iter_mut()
            .filter(|(_, claim)| all || claim.due <= now + claim.every / 4)
            .map(|(token, claim)| Beat { step: claim.step, token: *token, progress: claim.progress.take() })
            .collect()
    }

    fn next_due(&self) -> Option<Instant> {
        let mut held = self.lock();
        held.looks_at = held.by_token.values().map(|claim| claim.due).min();
        held.looks_at
    }

    fn settle(&self, beats: &[Beat], answers: &[Renewal], sent: Instant) {
        let mut held = self.lock();
        for (beat, answer) in beats.iter().zip(answers) {
            if answer.still_yours {
                if let Some(claim) = held.by_token.get_mut(&beat.token) {
                    claim.due = sent + claim.every;
                }
            } else if let Some(claim) = held.by_token.remove(&beat.token) {
                if answer.cancel_requested {
                    claim.stop.cancel.cancel();
                }
                claim.stop.gone.cancel();
            }
        }
    }

    /// After a call that failed: a progress that nobody took is kept, unless there is a newer one.
    fn take_back(&self, beats: Vec<Beat>) {
        let mut held = self.lock();
        for beat in beats {
            if let Some(claim) = held.by_token.get_mut(&beat.token) {
                claim.progress = claim.progress.take().or(beat.progress);
            }
        }
    }
}

/// Renews leases until `stop` fires.
pub(crate) async fn beat(held: Arc<Held>, pool: PgPool, stop: CancellationToken) {
    let outage = Outage::of(&pool);
    let mut connection = Connection::new(pool);
    let (mut failures, mut logged) = (0, false);
    loop {
        let wait = async {
            match held.next_due() {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let all = tokio::select! {
            () = stop.cancelled() => return,
            () = held.now.notified() => true,
            () = held.earlier.notified() => continue,
            () = wait => false,
        };
        let sent = Instant::now();
        let beats = held.due(sent, all);
        if beats.is_empty() {
            continue;
        }
        match send(&mut connection, &beats).await {
            Ok(answers) => {
                outage.answered();
                (failures, logged) = (0, false);
                held.settle(&beats, &answers, sent);
            }
            Err(error) => {
                connection.broken();
                measure::call_failed("heartbeat");
                if !outage.handles(&error) && !std::mem::replace(&mut logged, true) {
                    tracing::warn!(%error, claims = beats.len(), "a heartbeat failed; it is repeated until the database answers");
                }
                // What the database objects to can only be what handlers said: without it the call is good.
                if !protocol::is_of_the_content(&error) {
                    held.take_back(beats);
                }
                if all {
                    held.beat_now();
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(backoff(failures)) => failures += 1,
                }
            }
        }
    }
}

#[tracing::instrument(skip_all, fields(claims = beats.len()))]
async fn send(connection: &mut Connection, beats: &[Beat]) -> Result<Vec<Renewal>, tasker_shared::store::Error> {
    let conn = connection.get().await?;
    protocol::heartbeat(conn, beats).await
}
