//! A connection of one's own, and how long to wait for another.

use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};

/// A connection that one loop keeps for itself: the pool would ask the server about it each
/// time it is given back.
pub(crate) struct Connection {
    pool: PgPool,
    conn: Option<PoolConnection<Postgres>>,
}

impl Connection {
    pub(crate) fn new(pool: PgPool) -> Self {
        Self { pool, conn: None }
    }

    pub(crate) async fn get(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        let conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.pool.acquire().await?,
        };
        Ok(self.conn.insert(conn))
    }

    /// After any error: the next `get` brings another connection.
    pub(crate) fn broken(&mut self) {
        if let Some(mut conn) = self.conn.take() {
            conn.close_on_drop();
        }
    }
}

/// Between tries while the database does not answer: 50 ms doubling to 2 s.
pub(crate) fn backoff(failures: u32) -> Duration {
    jittered(Duration::from_millis(50 << failures.min(6)).min(Duration::from_secs(2)))
}

/// Between three quarters and the whole of it, so that workers do not go in step.
pub(crate) fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(rand::random_range(0.75..=1.0))
}
