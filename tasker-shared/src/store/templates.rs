//! Templates: registered once under a version, immutable from then on.

use std::sync::Arc;

use sqlx::PgConnection;

use super::Error;
use crate::template::{self, Checked, Compiled};

/// A template could not be registered or read.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The version exists with another content.
    #[error(
        "version: {namespace}/{name} {version} is registered with another content; a version never changes, give this one a new version"
    )]
    Immutable {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The version taken.
        version: String,
    },
    /// What the database holds is not a definition.
    #[error(transparent)]
    Stored(#[from] template::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] Error),
}

impl From<sqlx::Error> for TemplateError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// What became of a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registration {
    /// The row.
    pub template_id: i32,
    /// False when the same content was there already.
    pub is_new: bool,
}

/// Registers a template and creates its queues. The same content again changes nothing.
///
/// # Errors
/// If the version exists with another content, or a step starts tasks in a namespace that the role of
/// this connection may not use.
pub async fn register(conn: &mut PgConnection, checked: &Checked) -> Result<Registration, TemplateError> {
    register_by(conn, checked, None).await
}

/// The database asks whether who registers it may use every namespace that its steps name, now and
/// whenever one of them starts a task there: the role, and the key if there is one.
async fn register_by(
    conn: &mut PgConnection,
    checked: &Checked,
    key: Option<&str>,
) -> Result<Registration, TemplateError> {
    let template = &checked.template;
    let definition = template::to_json(template);
    let made = sqlx::query_scalar!(
        "insert into tasker.templates (namespace, name, version, definition, registered_key) values ($1, $2, $3, $4, $5)
         on conflict do nothing returning template_id",
        template.namespace,
        template.name,
        template.version,
        definition,
        key
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(template_id) = made else {
        let known = sqlx::query!(
            "select template_id, definition from tasker.templates where namespace = $1 and name = $2 and version = $3",
            template.namespace,
            template.name,
            template.version
        )
        .fetch_one(&mut *conn)
        .await?;
        if known.definition != definition {
            return Err(TemplateError::Immutable {
                namespace: template.namespace.clone(),
                name: template.name.clone(),
                version: template.version.clone(),
            });
        }
        return Ok(Registration { template_id: known.template_id, is_new: false });
    };
    insert_steps(conn, template_id, checked).await?;
    Ok(Registration { template_id, is_new: true })
}

/// As [`register`], asked for by a person: what is new is in the audit, in the caller's transaction.
/// `key` is the API key that asks, by its name, which is the actor then. Whoever applies again what
/// nobody may answer for any more answers for it.
///
/// # Errors
/// As [`register`], and if that key may not use a namespace that a step names.
pub async fn apply(
    conn: &mut PgConnection,
    checked: &Checked,
    actor: Option<&str>,
    key: Option<&str>,
) -> Result<Registration, TemplateError> {
    let template = &checked.template;
    let registered = register_by(&mut *conn, checked, key).await?;
    if !registered.is_new && template.crossings().next().is_some() {
        sqlx::query!(
            "select tasker.adopt_template($1, $2, coalesce($3, session_user::text)) as adopted",
            registered.template_id,
            key,
            actor
        )
        .fetch_one(conn)
        .await?;
    } else if registered.is_new {
        sqlx::query!(
            "insert into tasker.audit (subject, action, actor)
             values ($1, 'template.apply', left(coalesce($2, session_user::text), 100))",
            format!("template {}/{} {}", template.namespace, template.name, template.version),
            actor
        )
        .execute(conn)
        .await?;
    }
    Ok(registered)
}

async fn insert_steps(conn: &mut PgConnection, template_id: i32, checked: &Checked) -> Result<(), TemplateError> {
    let Checked { template, compiled } = checked;
    let graph = &compiled.definition.graph;
    let steps = &template.steps;
    let milliseconds = |duration: std::time::Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    let indexes: Vec<i32> = (0_i32..).take(steps.len()).collect();
    let names: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
    let handlers: Vec<&str> = steps.iter().map(|step| step.handler.as_str()).collect();
    let queues: Vec<String> = steps.iter().map(|step| template::step_queue(&template.namespace, step)).collect();
    let attempts: Vec<i32> =
        steps.iter().map(|step| i32::try_from(step.retry.max_attempts).unwrap_or(i32::MAX)).collect();
    let runs: Vec<i64> = steps.iter().map(|step| milliseconds(step.timeouts.run)).collect();
    let leases: Vec<i64> = steps.iter().map(|step| milliseconds(step.timeouts.heartbeat)).collect();
    sqlx::query!(
        "insert into tasker.template_steps (template_id, step_index, name, handler, queue, max_attempts, run_ms, heartbeat_ms)
         select $1, n.* from unnest($2::int[], $3::text[], $4::text[], $5::text[], $6::int[], $7::bigint[], $8::bigint[]) n",
        template_id,
        &indexes,
        &names as &[&str],
        &handlers as &[&str],
        &queues,
        &attempts,
        &runs,
        &leases
    )
    .execute(&mut *conn)
    .await?;
    let (mut parents, mut children) = (Vec::new(), Vec::new());
    for child in 0..u32::try_from(steps.len()).unwrap_or(u32::MAX) {
        for &parent in graph.parents(child) {
            parents.push(i32::try_from(parent).unwrap_or(i32::MAX));
            children.push(i32::try_from(child).unwrap_or(i32::MAX));
        }
    }
    sqlx::query!(
        "insert into tasker.template_edges (template_id, parent_index, child_index)
         select $1, n.* from unnest($2::int[], $3::int[]) n",
        template_id,
        &parents,
        &children
    )
    .execute(&mut *conn)
    .await?;
    let mut distinct = queues;
    distinct.sort_unstable();
    distinct.dedup();
    sqlx::query!("select tasker.create_queue(q)::text as made from unnest($1::text[]) q", &distinct)
        .fetch_all(&mut *conn)
        .await?;
    Ok(())
}

/// Reads templates by id.
pub async fn load(conn: &mut PgConnection, template_ids: &[i32]) -> Result<Vec<Arc<Compiled>>, TemplateError> {
    let rows =
        sqlx::query!("select template_id, definition from tasker.templates where template_id = any($1)", template_ids)
            .fetch_all(conn)
            .await?;
    rows.into_iter().map(|row| Ok(Arc::new(template::load(row.template_id, row.definition)?))).collect()
}

#[cfg(test)]
mod tests {
    use tasker_testing::TestDatabase;

    #[tokio::test]
    async fn templates_of_before_are_the_owners_but_for_those_that_a_key_had_no_right_to() {
        let files = sqlx::migrate!("./migrations");
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        pgmq::install::install_sql_from_embedded(&pool).await.expect("PGMQ");
        let of_before = "
            insert into tasker.api_keys (key_id, name, secret_hash, role, namespaces, created_by, created_at, revoked_at) values
              ('1', 'shop', sha256('1'), 'admin', null, 'test', '2026-01-01', '2026-02-01'),
              ('2', 'shop', sha256('2'), 'admin', '{shop}', 'test', '2026-02-01', null),
              ('3', 'both', sha256('3'), 'admin', '{shop,billing}', 'test', '2026-01-01', null);
            insert into tasker.templates (namespace, name, version, definition, created_at)
            select 'shop', t.name, '1', jsonb_build_object('steps', jsonb_build_array(jsonb_build_object('name', 'a', 'task', jsonb_build_object('template', 'x', 'namespace', t.namespace)))), t.at::timestamptz
            from (values ('by_owner', 'billing', '2026-03-01'), ('by_all', 'billing', '2026-01-15'), ('by_shop', 'billing', '2026-03-01'),
                         ('within', 'shop', '2026-03-01'), ('by_both', 'billing', '2026-03-01')) t(name, namespace, at);
            insert into tasker.audit (subject, action, actor)
            select format('template shop/%s 1', a.name), 'template.apply', a.actor
            from (values ('by_owner', 'ada'), ('by_all', 'shop'), ('by_shop', 'shop'), ('within', 'shop'), ('by_both', 'both')) a(name, actor)";
        for file in files.iter() {
            if file.version == 19 {
                sqlx::raw_sql(of_before).execute(&pool).await.expect("rows of before");
            }
            sqlx::raw_sql(file.sql.clone()).execute(&pool).await.expect("migrated");
        }
        let found: Vec<(String, Option<String>, bool)> = sqlx::query_as(
            "select name, registered_key, tasker.crossing_problem(template_id, 'billing') is null from tasker.templates
             where registered_role is null order by name",
        )
        .fetch_all(&pool)
        .await
        .expect("templates");
        let wanted = [
            ("by_all", None, true),
            ("by_both", None, true),
            ("by_owner", None, true),
            ("by_shop", Some("shop"), false),
            ("within", None, true),
        ];
        assert_eq!(found, wanted.map(|(name, key, may)| (name.to_owned(), key.map(str::to_owned), may)));
    }
}
