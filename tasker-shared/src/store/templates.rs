//! Templates: registered once under a version, immutable from then on.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;
use sqlx::PgConnection;

use super::Error;
use crate::state_machine::wait::Work;
use crate::state_machine::{Definition, StepDefinition};
use crate::template::{self, InputSchema, Join, Keep, OnFailure, Template};

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
    /// The input schema that the database holds does not compile.
    #[error("the input_schema of template {0} does not compile; register the template again under a new version")]
    StoredSchema(i32),
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
pub async fn register(conn: &mut PgConnection, template: &Template) -> Result<Registration, TemplateError> {
    let definition = template::to_json(template);
    let made = sqlx::query_scalar!(
        "insert into tasker.templates (namespace, name, version, definition) values ($1, $2, $3, $4)
         on conflict do nothing returning template_id",
        template.namespace,
        template.name,
        template.version,
        definition
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
    insert_steps(conn, template_id, template).await?;
    Ok(Registration { template_id, is_new: true })
}

/// As [`register`], asked for by a person: what is new is in the audit, in the caller's transaction.
pub async fn apply(
    conn: &mut PgConnection,
    template: &Template,
    actor: Option<&str>,
) -> Result<Registration, TemplateError> {
    let registered = register(&mut *conn, template).await?;
    if registered.is_new {
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

async fn insert_steps(conn: &mut PgConnection, template_id: i32, template: &Template) -> Result<(), TemplateError> {
    let graph = template.graph()?;
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

/// A template as orchestrators keep it in memory; it never changes.
#[derive(Debug)]
pub struct Loaded {
    /// What decisions read.
    pub definition: Definition,
    /// The steps that wait for a signal, by index, with its name.
    pub signals: Vec<(u32, Arc<str>)>,
    /// Whether any of its steps starts tasks.
    pub starts_tasks: bool,
    /// Checks inputs; `None` accepts any object.
    pub schema: Option<InputSchema>,
    /// Ends whose trace is exported although sampling did not choose it.
    pub keep: Vec<Keep>,
}

/// Reads templates by id.
pub async fn load(conn: &mut PgConnection, template_ids: &[i32]) -> Result<Vec<Arc<Loaded>>, TemplateError> {
    let rows =
        sqlx::query!("select template_id, definition from tasker.templates where template_id = any($1)", template_ids)
            .fetch_all(conn)
            .await?;
    rows.into_iter().map(|row| loaded(row.template_id, row.definition).map(Arc::new)).collect()
}

/// What a stored definition (see [`template::to_json`]) says, in the form that decisions read.
pub fn loaded(template_id: i32, stored: Value) -> Result<Loaded, TemplateError> {
    let template = template::from_json(stored)?;
    let graph = template.graph()?;
    let names: Vec<Arc<str>> = template.steps.iter().map(|step| step.name.as_str().into()).collect();
    let by_name: HashMap<Arc<str>, u32> = names.iter().cloned().zip(0_u32..).collect();
    let mut steps = Vec::with_capacity(template.steps.len());
    let mut limits = template.limits()?.into_iter();
    for (index, step) in (0_u32..).zip(&template.steps) {
        let input = step.input_template()?;
        let work = step.work();
        let mut needs: Vec<u32> = match &input {
            _ if !work.takes_input() => Vec::new(),
            Some(input) => input.references().filter_map(|name| by_name.get(name).copied()).collect(),
            None if step.for_each.is_some() => Vec::new(),
            None => graph.parents(index).to_vec(),
        };
        let when = step.condition()?;
        let looked_at = when.as_ref().and_then(|when| by_name.get(when.reference().step()?).copied());
        needs.extend(looked_at.filter(|step| !needs.contains(step)));
        let item_needs = if input.is_some() { needs.clone() } else { Vec::new() };
        let for_each = step.map(item_needs)?;
        if let Some(for_each) = &for_each {
            needs.extend(for_each.reference.step().and_then(|name| by_name.get(name).copied()));
        }
        steps.push(StepDefinition {
            name: names[index as usize].clone(),
            work,
            handler: step.handler.as_str().into(),
            queue: template::step_queue(&template.namespace, step).into(),
            priority: step.priority,
            retry: step.retry.clone(),
            queue_timeout: step.timeouts.queue,
            total: step.timeouts.total,
            run_timeout: Some(step.timeouts.run),
            input,
            needs,
            when,
            branches: step.branches.iter().filter_map(|name| by_name.get(name.as_str()).copied()).collect(),
            join: step.join,
            limits: limits.next().unwrap_or_default(),
            for_each,
        });
    }
    let reaches_far = steps.iter().any(|step| {
        step.when.is_some() || step.for_each.is_some() || !step.branches.is_empty() || step.join == Join::Any
    });
    let schema = template
        .input_schema
        .as_ref()
        .map(|schema| InputSchema::compile(schema).map_err(|_| TemplateError::StoredSchema(template_id)))
        .transpose()?;
    let definition = Definition {
        template_id,
        namespace: template.namespace.as_str().into(),
        name: template.name.as_str().into(),
        version: template.version.as_str().into(),
        block_on_failure: template.on_failure == OnFailure::Block,
        total: template.timeouts.total,
        fair_key: template.fair_key_template()?,
        steps,
        graph,
        by_name,
        reaches_far,
    };
    let signals = (0_u32..).zip(&definition.steps);
    let signals = signals.filter_map(|(index, step)| Some((index, step.work.signal()?.name.as_str().into()))).collect();
    let starts_tasks = definition.steps.iter().any(|step| matches!(step.work, Work::Task(_)));
    Ok(Loaded { definition, signals, starts_tasks, schema, keep: template.trace.keep.clone() })
}
