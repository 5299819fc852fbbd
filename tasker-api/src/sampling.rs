//! What share of new traces is recorded, by namespace.

use sqlx::PgConnection;

use tasker_shared::store::Error;

/// Sets the share of a namespace (or of `*`, every other one) from 0 to 1; `None` forgets it.
/// Answers what holds: a share outside is clamped. Audited.
pub async fn set(conn: &mut PgConnection, namespace: &str, ratio: Option<f64>) -> Result<Option<f64>, Error> {
    Ok(sqlx::query_scalar!("select tasker.set_sampling($1, $2)", namespace, ratio).fetch_one(conn).await?)
}

/// Every share that is set, by namespace.
pub async fn all(conn: &mut PgConnection) -> Result<Vec<(String, f64)>, Error> {
    let rows = sqlx::query!("select namespace, ratio from tasker.sampling order by namespace").fetch_all(conn).await?;
    Ok(rows.into_iter().map(|row| (row.namespace, row.ratio)).collect())
}
