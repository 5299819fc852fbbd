//! The statements of retention: what is removed, in bounded batches, each a transaction of its own.
//!
//! Nothing here runs on the hot path, and nothing open is ever touched.

use sqlx::PgConnection;
use tasker_shared::store::Error;
use uuid::Uuid;

/// Rows of `tasker.tasks` that one statement looks at.
const SCAN: i32 = 20_000;
/// Tasks removed in one transaction.
pub const BATCH: usize = 500;
/// Hints removed in one transaction, of those that nothing will come of.
const HINTS: i32 = 100_000;
/// Quarantined messages removed in one transaction.
const MESSAGES: i32 = 5_000;
/// Key of the advisory lock: "taskerR" in ASCII. One process removes at a time.
const LOCK: i64 = 0x0074_6173_6b65_7252;

/// Where a walk over the tasks of all templates stands: a template, and the last of its tasks that was read.
pub type Cursor = (i32, Uuid);
/// Where it begins.
pub const START: Cursor = (0, Uuid::nil());

/// What may be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Expired tasks, oldest first of each template.
    pub tasks: Vec<Uuid>,
    /// Where the walk goes on; `None` when it is done.
    pub next: Option<Cursor>,
}

/// Looks for expired tasks behind this cursor, of which [`BATCH`] are removed at a time. One statement,
/// bounded; it reads no task twice.
pub async fn find(conn: &mut PgConnection, (template, after): Cursor, archiving: bool) -> Result<Found, Error> {
    let row = sqlx::query!(
        r#"select tasks as "tasks!", next_template, next_after from tasker.expired_by_template($1, $2, $3, $4)"#,
        template,
        after,
        SCAN,
        archiving
    )
    .fetch_one(conn)
    .await?;
    Ok(Found { tasks: row.tasks, next: row.next_template.zip(row.next_after) })
}

/// Weeks of the log that will be dropped whole once their tasks are gone.
pub async fn expired_weeks(conn: &mut PgConnection, archiving: bool) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(r#"select tasker.expired_weeks($1) as "weeks!""#, archiving).fetch_one(conn).await?)
}

/// Takes the right to remove, until the transaction ends; false if another process has it.
pub async fn lock(conn: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock($1) as "mine!""#, LOCK).fetch_one(conn).await?)
}

/// Locks those of the tasks that are still expired; whoever acts on one meanwhile keeps it.
pub async fn lock_tasks(conn: &mut PgConnection, tasks: &[Uuid], archiving: bool) -> Result<Vec<Uuid>, Error> {
    Ok(sqlx::query_scalar!(r#"select tasker.lock_expired($1, $2) as "tasks!""#, tasks, archiving)
        .fetch_one(conn)
        .await?)
}

/// Everything there is about these tasks, a line of JSON each.
pub async fn archive(conn: &mut PgConnection, tasks: &[Uuid]) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(r#"select line as "line!" from tasker.archive_tasks($1)"#, tasks).fetch_all(conn).await?)
}

/// Removes locked tasks with all that is theirs.
pub async fn remove(conn: &mut PgConnection, tasks: &[Uuid], weeks: &[String]) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(r#"select tasker.remove_tasks($1, $2) as "removed!""#, tasks, weeks).fetch_one(conn).await?)
}

/// Drops weeks of the log that have no task any more; answers how many.
pub async fn drop_weeks(conn: &mut PgConnection) -> Result<i32, Error> {
    Ok(sqlx::query_scalar!(r#"select tasker.drop_empty_weeks() as "dropped!""#).fetch_one(conn).await?)
}

/// Removes old quarantined messages (answers how many) and sums counters up.
pub async fn tidy(conn: &mut PgConnection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(r#"select quarantined as "quarantined!" from tasker.tidy($1)"#, MESSAGES)
        .fetch_one(conn)
        .await?)
}

/// Removes hints of tasks and steps that have ended; answers how many. Settles leave none, but those of
/// older releases do. It looks at every hint.
pub async fn forget_due(conn: &mut PgConnection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(r#"select tasker.forget_due($1) as "removed!""#, HINTS).fetch_one(conn).await?)
}

/// Tasks that nothing will move; there must be none. It looks at every open task.
pub async fn stuck_tasks(conn: &mut PgConnection) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(r#"select count(*) as "stuck!" from tasker.stuck_tasks()"#).fetch_one(conn).await?)
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Row as _};
    use tasker_shared::store::HOT_PATH_SETTINGS;
    use tasker_shared::store::tx::{self, PoolOptions};
    use tasker_testing::TestDatabase;

    #[tokio::test]
    async fn look_for_stuck_tasks_compares_nothing_one_by_one_in_a_session_of_the_hot_path() {
        let database = TestDatabase::fresh().await;
        let options = PoolOptions { settings: HOT_PATH_SETTINGS, ..PoolOptions::default() };
        let pool = tx::pool(&database.url(), &options).await.expect("a pool");
        let mut conn = pool.acquire().await.expect("a connection");
        let function = "select proconfig, prosrc from pg_proc where oid = 'tasker.stuck_tasks'::regproc";
        let row = sqlx::query(function).fetch_one(&mut *conn).await.expect("the function");
        for setting in row.get::<Vec<String>, _>("proconfig") {
            let (name, value) = setting.split_once('=').expect("a setting");
            let set = "select set_config($1, $2, false)";
            sqlx::query(set).bind(name).bind(value).execute(&mut *conn).await.expect("set");
        }
        let source: String = row.get("prosrc");
        let statement =
            &source[source.find("with requested").expect("its statement")..source.rfind(';').expect("its end")];
        let statement = statement.split(';').next().unwrap_or_default().replace("v_queued", "'{}'::text[]");
        let explain = AssertSqlSafe(format!("explain (costs off) {statement}"));
        let plan: Vec<String> = sqlx::query_scalar(explain).fetch_all(&mut *conn).await.expect("a plan");
        let plan = plan.join("\n");
        assert!(plan.contains("Hash Cond") && !plan.contains("Join Filter"), "{plan}");
    }
}
