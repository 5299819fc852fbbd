//! What the database knows of a worker: its hello, and the session that listens and holds its lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tasker_shared::store::Error as StoreError;
use tasker_shared::store::outage::Outage;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::connection::{Connection, backoff};
use crate::held::Held;
use crate::protocol::{self, Hello};

/// Results get at least this long to reach the database when the drain's time is up.
pub(crate) const LAST_REPORTS: Duration = Duration::from_secs(2);

const CHANNEL: &str = "tasker";
const HELLO_EVERY: Duration = Duration::from_secs(10);

/// What the database knows of this worker.
pub(crate) struct Presence {
    pub(crate) worker: String,
    pub(crate) namespace: String,
    pub(crate) version: String,
    pub(crate) slots: i32,
    pub(crate) lock_key: i64,
    pub(crate) handlers: Vec<String>,
    pub(crate) queues: Vec<String>,
    pub(crate) wakes: Vec<Arc<Notify>>,
    pub(crate) held: Arc<Held>,
    /// Our session holds the lock. Only then may the database conclude anything from it.
    pub(crate) locked: AtomicBool,
    /// The session listens, or was lost: the database should hear of it.
    pub(crate) changed: Notify,
    /// The first hello was answered.
    pub(crate) known: CancellationToken,
    /// Someone changed where traces go.
    pub(crate) trace_changed: Arc<Notify>,
}

impl Presence {
    /// Hello at start, every 10 s and after a reconnect; bye when `stop` fires.
    pub(crate) async fn say_hello(self: Arc<Self>, pool: PgPool, stop: CancellationToken) {
        let outage = Outage::of(&pool);
        let mut connection = Connection::new(pool);
        let (mut failures, mut logged) = (0, false);
        // The lock comes before the hello that names it. Behind a pooler there may be no lock.
        let _ = timeout(Duration::from_secs(2), stop.run_until_cancelled(self.changed.notified())).await;
        while !stop.is_cancelled() {
            let wait = match self.hello(&mut connection).await {
                Ok(()) => {
                    outage.answered();
                    (failures, logged) = (0, false);
                    self.known.cancel();
                    HELLO_EVERY
                }
                Err(error) => {
                    connection.broken();
                    if !outage.handles(&error) && !std::mem::replace(&mut logged, true) {
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
                match async { protocol::worker_bye(connection.get().await?, &self.worker).await }.await {
                    Ok(()) => return,
                    Err(_) => connection.broken(),
                }
                tokio::time::sleep(backoff(failures)).await;
            }
        };
        // Without it the worker counts as alive for another 30 s: a pity, no harm.
        let _ = timeout(LAST_REPORTS, bye).await;
    }

    async fn hello(&self, connection: &mut Connection) -> Result<(), StoreError> {
        let hello = Hello {
            worker: &self.worker,
            namespace: &self.namespace,
            queues: &self.queues,
            handlers: &self.handlers,
            slots: self.slots,
            lock_key: self.locked.load(Ordering::Relaxed).then_some(self.lock_key),
            version: &self.version,
        };
        protocol::worker_hello(connection.get().await?, &hello).await
    }

    /// Holds the lock and listens until `stop` fires; a lost session is made again.
    pub(crate) async fn listen(self: Arc<Self>, pool: PgPool, stop: CancellationToken) {
        let outage = Outage::of(&pool);
        let (mut failures, mut logged) = (0, false);
        loop {
            let session = async {
                let result = self.listen_once(&pool, &mut failures).await;
                if self.locked.swap(false, Ordering::Relaxed) {
                    self.changed.notify_one();
                }
                if let Err(error) = result {
                    if failures == 0 {
                        logged = false;
                    }
                    if !outage.handles(&error) && !std::mem::replace(&mut logged, true) {
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
        // What happened before we listened reached nobody.
        self.wakes.iter().for_each(|wake| wake.notify_one());
        self.held.beat_now();
        while let Some(notification) = listener.try_recv().await? {
            self.notified(notification.payload());
        }
        Ok(())
    }

    fn notified(&self, payload: &str) {
        if payload.strip_prefix("cancel:") == Some(&self.worker) {
            self.held.beat_now();
        } else if payload == "trace" {
            self.trace_changed.notify_one();
        } else if let Some(at) = self.queues.iter().position(|queue| queue == payload) {
            self.wakes[at].notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

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
            presence.notified(other);
        }
        assert_eq!(woken(), [false, false]);
        presence.notified("worker_shop__slow");
        assert_eq!(woken(), [false, true]);
        presence.notified("worker_shop");
        assert_eq!(woken(), [true, false]);
    }
}
