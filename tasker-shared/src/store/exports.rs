//! Export batches: one row per transaction that moved something, until its spans are acknowledged.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::Error;

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
/// row is older than 15 s, or gone), oldest first.
pub async fn adopt(conn: &mut PgConnection, instance: Uuid, limit: i64) -> Result<Vec<Orphan>, Error> {
    let rows = sqlx::query!(
        "with orphan as (
           select b.batch_id from tasker.export_batches b
           where b.instance is distinct from $1
             and not exists (select from tasker.instances i
                             where i.instance = b.instance and i.seen_at > clock_timestamp() - interval '15 s')
           order by b.at limit $2 for update skip locked
         )
         update tasker.export_batches b set instance = $1 from orphan o where b.batch_id = o.batch_id
         returning b.batch_id, b.task_uuids, b.at",
        instance,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| Orphan { batch_id: row.batch_id, task_uuids: row.task_uuids, at: row.at }).collect())
}

/// Takes over up to `limit` more such batches that moved one of these tasks, so that the log of a
/// large task is read once for all of them.
pub async fn adopt_of(
    conn: &mut PgConnection,
    instance: Uuid,
    task_uuids: &[Uuid],
    limit: i64,
) -> Result<Vec<Orphan>, Error> {
    let rows = sqlx::query!(
        "with orphan as (
           select b.batch_id from tasker.export_batches b
           where b.instance is distinct from $1 and b.task_uuids && $2
             and not exists (select from tasker.instances i
                             where i.instance = b.instance and i.seen_at > clock_timestamp() - interval '15 s')
           order by b.at limit $3 for update skip locked
         )
         update tasker.export_batches b set instance = $1 from orphan o where b.batch_id = o.batch_id
         returning b.batch_id, b.task_uuids, b.at",
        instance,
        task_uuids,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| Orphan { batch_id: row.batch_id, task_uuids: row.task_uuids, at: row.at }).collect())
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
