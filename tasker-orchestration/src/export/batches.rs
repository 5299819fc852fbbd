//! Export batches: one row per transaction that moved something, until its spans are acknowledged.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tasker_shared::store::Error;
use uuid::Uuid;

/// A batch that nobody holds in memory.
#[derive(Debug, Clone)]
pub struct Orphan {
    /// Its row.
    pub batch_id: Uuid,
    /// The tasks it moved.
    pub task_uuids: Vec<Uuid>,
    /// The time that all its moves bear.
    pub at: DateTime<Utc>,
}

/// Forgets batches whose spans a receiver has acknowledged.
pub async fn delete(conn: &mut PgConnection, batch_ids: &[Uuid]) -> Result<(), Error> {
    sqlx::query!("delete from tasker.export_batches where batch_id = any($1)", batch_ids).execute(conn).await?;
    Ok(())
}

/// Gives batches up that do not fit into memory: whoever recovers next takes them.
pub async fn release(conn: &mut PgConnection, batch_ids: &[Uuid]) -> Result<(), Error> {
    sqlx::query!("update tasker.export_batches set instance = null where batch_id = any($1)", batch_ids)
        .execute(conn)
        .await?;
    Ok(())
}

/// Takes over up to `limit` batches that were released or whose owner is dead (its liveness
/// row is older than 15 s, or gone), oldest first, from `after` on: what a living owner holds is
/// passed over once for all the pages that are taken one after another.
pub async fn adopt(
    conn: &mut PgConnection,
    instance: Uuid,
    after: Option<DateTime<Utc>>,
    limit: i64,
) -> Result<Vec<Orphan>, Error> {
    let rows = sqlx::query_file!("src/export/adopt.sql", instance, after, limit).fetch_all(conn).await?;
    Ok(rows.into_iter().map(|row| Orphan { batch_id: row.batch_id, task_uuids: row.task_uuids, at: row.at }).collect())
}

/// Sets batches aside whose spans a receiver refused for good: id, how many spans, and the reason.
/// They are no longer waited for, and retention goes on.
pub async fn refuse(conn: &mut PgConnection, refused: &[(Uuid, i32, String)]) -> Result<(), Error> {
    let ids: Vec<Uuid> = refused.iter().map(|(id, ..)| *id).collect();
    let spans: Vec<i32> = refused.iter().map(|(_, spans, _)| *spans).collect();
    let reasons: Vec<&str> = refused.iter().map(|(.., reason)| reason.as_str()).collect();
    sqlx::query!(
        "with refused as (
           delete from tasker.export_batches b using unnest($1::uuid[], $2::int[], $3::text[]) r(batch_id, spans, reason)
           where b.batch_id = r.batch_id returning b.batch_id, b.task_uuids, b.at, r.spans, r.reason
         )
         insert into tasker.refused_exports (batch_id, task_uuids, at, spans, reason)
         select batch_id, task_uuids, at, spans, reason from refused",
        &ids,
        &spans,
        &reasons as &[&str]
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What was set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Transactions some of whose spans were refused.
    pub batches: i64,
    /// Spans that were refused.
    pub spans: i64,
    /// When the first of them was.
    pub oldest_at: Option<DateTime<Utc>>,
    /// When the last of them was.
    pub newest_at: Option<DateTime<Utc>>,
    /// Why that was: words of the receiver.
    pub reason: Option<String>,
}

/// What is set aside, of all orchestrators.
pub async fn set_aside(conn: &mut PgConnection) -> Result<SetAside, Error> {
    Ok(sqlx::query_as!(
        SetAside,
        r#"select count(*) as "batches!", coalesce(sum(r.spans), 0)::bigint as "spans!", min(r.refused_at) as oldest_at,
             max(r.refused_at) as newest_at,
             (select n.reason from tasker.refused_exports n order by n.refused_at desc limit 1) as reason
           from tasker.refused_exports r"#
    )
    .fetch_one(conn)
    .await?)
}

/// Gives up to 10,000 of the batches that were set aside back to the orchestrators, which send their
/// spans again; answers how many.
pub async fn send_again(conn: &mut PgConnection) -> Result<u64, Error> {
    let back = sqlx::query!(
        "with back as (
           delete from tasker.refused_exports r
           where r.batch_id in (select o.batch_id from tasker.refused_exports o order by o.refused_at limit 10000)
           returning r.batch_id, r.task_uuids, r.at
         )
         insert into tasker.export_batches (batch_id, instance, task_uuids, at)
         select batch_id, null, task_uuids, at from back"
    )
    .execute(conn)
    .await?;
    Ok(back.rows_affected())
}

/// Forgets those of the oldest thousand batches that were set aside whose tasks retention has removed:
/// nothing is left that could be sent.
pub async fn forget_removed(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::query!(
        "delete from tasker.refused_exports r using (
           select o.batch_id, o.task_uuids from tasker.refused_exports o order by o.refused_at limit 1000
         ) old
         where r.batch_id = old.batch_id
           and not exists (select from tasker.tasks t where t.task_uuid = any(old.task_uuids))"
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Batches of this very orchestrator, at least 15 s old, that are none of the `held` ones in its
/// memory: it committed them without learning so, or could not delete them.
pub async fn left_behind(
    conn: &mut PgConnection,
    instance: Uuid,
    held: &[Uuid],
    limit: i64,
) -> Result<Vec<Orphan>, Error> {
    let rows = sqlx::query!(
        "select batch_id, task_uuids, at from tasker.export_batches
         where instance = $1 and at < clock_timestamp() - interval '15 s' and batch_id <> all($2)
         order by at limit $3",
        instance,
        held,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| Orphan { batch_id: row.batch_id, task_uuids: row.task_uuids, at: row.at }).collect())
}

/// Says that this orchestrator lives.
pub async fn alive(conn: &mut PgConnection, instance: Uuid) -> Result<(), Error> {
    sqlx::query!(
        "insert into tasker.instances (instance, version) values ($1, $2)
         on conflict (instance) do update set seen_at = clock_timestamp()",
        instance,
        env!("CARGO_PKG_VERSION")
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Says that it has ended: what it still holds may be adopted at once.
pub async fn gone(conn: &mut PgConnection, instance: Uuid) -> Result<(), Error> {
    sqlx::query!("delete from tasker.instances where instance = $1", instance).execute(conn).await?;
    Ok(())
}

/// What waits for a receiver in the database.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// Transactions whose spans were not acknowledged.
    pub batches: i64,
    /// Age of the oldest of them.
    pub oldest_seconds: Option<f64>,
}

/// How much waits, of all orchestrators, and for how long.
pub async fn waiting(conn: &mut PgConnection) -> Result<Waiting, Error> {
    Ok(sqlx::query_as!(
        Waiting,
        r#"select count(*) as "batches!", extract(epoch from clock_timestamp() - min(at))::float8 as oldest_seconds
           from tasker.export_batches"#
    )
    .fetch_one(conn)
    .await?)
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Executor};
    use tasker_shared::store::HOT_PATH_SETTINGS;
    use tasker_shared::store::tx::{self, PoolOptions};
    use tasker_testing::TestDatabase;

    use super::*;

    async fn plan(conn: &mut PgConnection, statement: &str) -> String {
        let lines: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!("explain (costs off) {statement}")))
            .fetch_all(conn)
            .await
            .expect("a plan");
        lines.join("\n")
    }

    #[tokio::test]
    async fn the_oldest_batches_are_found_without_sorting_them_all() {
        let database = TestDatabase::fresh().await;
        for settings in [HOT_PATH_SETTINGS, &[]] {
            let pool =
                tx::pool(&database.url(), &PoolOptions { settings, ..PoolOptions::default() }).await.expect("a pool");
            let mut conn = pool.acquire().await.expect("a connection");
            conn.execute(
                "insert into tasker.export_batches (batch_id, instance, task_uuids, at)
                 select gen_random_uuid(), null, '{}', clock_timestamp() from generate_series(1, 5000)",
            )
            .await
            .expect("batches");
            conn.execute("analyze tasker.export_batches").await.expect("counted");
            let adopt = include_str!("adopt.sql");
            conn.execute(AssertSqlSafe(format!("prepare adopt (uuid, timestamptz, bigint) as {adopt}")))
                .await
                .expect("prepared");
            for statement in
                ["execute adopt (gen_random_uuid(), null, 200)", "select min(at) from tasker.export_batches"]
            {
                let plan = plan(&mut conn, statement).await;
                assert!(plan.contains("export_batches_at") && !plan.contains("Sort"), "{plan}");
            }
        }
    }
}
