//! Flow control: what an operator pauses and limits, and what that leaves room for.

use std::time::Duration;

use chrono::TimeDelta;
use serde::Serialize;
use sqlx::PgConnection;

use super::Error;
use crate::state_machine::flow::Free;

/// Pauses a queue of steps, or with `resume` lets it go on; `accepted`, or why not. Audited.
pub async fn pause(
    conn: &mut PgConnection,
    queue: &str,
    resume: bool,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select case when $4 then tasker.resume_queue($1, $2, coalesce($3, session_user::text))
                  else tasker.pause_queue($1, $2, coalesce($3, session_user::text)) end as "answer!""#,
        queue,
        reason,
        actor,
        resume
    )
    .fetch_one(conn)
    .await?)
}

/// A limit, and what of it is used now.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
#[expect(missing_docs, reason = "columns of tasker.limits, explained there")]
pub struct LimitUse {
    #[serde(skip)]
    pub limit_id: i64,
    pub namespace: String,
    /// namespace, handler or template; or `open_tasks`, of which `concurrency` is how many tasks may be open.
    pub kind: String,
    pub name: String,
    pub concurrency: Option<i32>,
    pub in_use: i64,
    pub rate: Option<i32>,
    pub per_ms: Option<i64>,
    /// What the bucket holds now.
    pub tokens: Option<f64>,
    /// Milliseconds until it holds a whole token.
    pub next_ms: Option<f64>,
}

impl LimitUse {
    /// What it has left.
    pub fn free(&self) -> Free {
        Free {
            limit_id: self.limit_id,
            slots: self.concurrency.map(|most| i64::from(most) - self.in_use),
            tokens: self.tokens,
        }
    }

    /// In words why it lets nothing through now; `None` if it does.
    pub fn why(&self) -> Option<String> {
        let name = self.name.trim_start_matches("rate ");
        match (self.concurrency, self.rate) {
            (Some(most), _) if self.in_use >= most.into() => {
                Some(format!("limit {name} has {} of {most} in use", self.in_use))
            }
            (_, Some(rate)) if self.tokens.is_some_and(|tokens| tokens < 1.0) => {
                let per = crate::duration::in_words(TimeDelta::milliseconds(self.per_ms.unwrap_or_default()));
                Some(format!("limit {name} allows {rate} per {per}, and they are spent for now"))
            }
            _ => None,
        }
    }
}

/// The limits of these names, as far as they have a row; an estimate without locks.
pub async fn limit_use(conn: &mut PgConnection, names: &[String]) -> Result<Vec<LimitUse>, Error> {
    let limits = sqlx::query_as!(
        LimitUse,
        r#"select limit_id as "limit_id!", namespace as "namespace!", kind as "kind!", name as "name!", concurrency,
             in_use as "in_use!", rate, per_ms, tokens, next_ms
           from tasker.limit_use($1) order by name"#,
        names
    );
    Ok(limits.fetch_all(conn).await?)
}

/// The limits of namespaces and handlers, the first thousand of templates that are in use, and those on
/// open tasks.
pub async fn limits(conn: &mut PgConnection, namespace: Option<&str>) -> Result<Vec<LimitUse>, Error> {
    let names = sqlx::query_scalar!(
        "select name from tasker.limits l where ($1::text is null or namespace = $1)
           and (kind <> 'template' or rate is not null or exists (select from tasker.places p where p.limit_id = l.limit_id))
         order by kind = 'template', name limit 1000",
        namespace
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut limits = limit_use(conn, &names).await?;
    let open = sqlx::query!(
        r#"select namespace, open_tasks, tasker.open_tasks(namespace, open_tasks)::bigint as "open!"
           from tasker.open_tasks_limits where $1::text is null or namespace = $1 order by namespace limit 1000"#,
        namespace
    );
    limits.extend(open.fetch_all(conn).await?.into_iter().map(|row| LimitUse {
        limit_id: 0,
        name: format!("open tasks of {}", row.namespace),
        namespace: row.namespace,
        kind: "open_tasks".into(),
        concurrency: Some(row.open_tasks),
        in_use: row.open,
        rate: None,
        per_ms: None,
        tokens: None,
        next_ms: None,
    }));
    Ok(limits)
}

/// Sets how many open tasks a namespace may have, or removes that limit; `accepted`, or why not. Audited.
pub async fn set_open_tasks(
    conn: &mut PgConnection,
    namespace: &str,
    open_tasks: Option<i32>,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.set_open_tasks_limit($1, $2, $3, coalesce($4, session_user::text)) as "answer!""#,
        namespace,
        open_tasks,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// The limit of a namespace, or of one handler in it, as an operator sets it.
#[derive(Debug, Clone, Default)]
pub struct SetLimit {
    /// Its namespace.
    pub namespace: String,
    /// The handler; `None`: all of the namespace.
    pub handler: Option<String>,
    /// How many may be in flight at once.
    pub concurrency: Option<i32>,
    /// How many may be sent in each such time.
    pub rate: Option<(i32, Duration)>,
}

/// Sets a limit; `accepted`, or why not. Audited.
pub async fn set_limit(
    conn: &mut PgConnection,
    limit: &SetLimit,
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    let per = limit.rate.map(|(_, per)| per.as_secs_f64());
    Ok(sqlx::query_scalar!(
        r#"select tasker.set_limit($1, $2, $3, $4, make_interval(secs => $5), $6, coalesce($7, session_user::text)) as "answer!""#,
        limit.namespace,
        limit.handler,
        limit.concurrency,
        limit.rate.map(|(rate, _)| rate),
        per,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}

/// Removes a limit; `accepted`, or why not. Audited.
pub async fn remove_limit(
    conn: &mut PgConnection,
    (namespace, handler): (&str, Option<&str>),
    actor: Option<&str>,
    reason: Option<&str>,
) -> Result<String, Error> {
    Ok(sqlx::query_scalar!(
        r#"select tasker.remove_limit($1, $2, $3, coalesce($4, session_user::text)) as "answer!""#,
        namespace,
        handler,
        reason,
        actor
    )
    .fetch_one(conn)
    .await?)
}
