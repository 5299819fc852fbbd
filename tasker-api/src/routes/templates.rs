//! Templates: the definitions of workflows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tasker_shared::store::views::TemplateView;
use tasker_shared::store::{templates, tx, views};
use tasker_shared::template::{self, Checked, MAX_FILE_BYTES, Template, diff};

use super::{NamespaceQuery, Page, own_namespaces};
use crate::auth::Scope;
use crate::operation::{Answer, Api, Call, Nothing, Operation};
use crate::problem::{Finding, INVALID_REQUEST, Problem};

pub(super) fn add(api: &mut Api) {
    let (read, write) = (Scope::TemplatesRead, Scope::TemplatesWrite);
    // YAML in JSON: a line break takes two bytes.
    let max = 2 * MAX_FILE_BYTES;
    api.add(
        Operation::get(
            "/v1/templates",
            "list_templates",
            "Every version of every template; the latest version stands last",
        ),
        read,
        list,
    );
    api.add(
        Operation::post("/v1/templates", "apply_template", "Register a template; a version that exists never changes")
            .body_up_to(max),
        write,
        apply,
    );
    api.add(
        Operation::post("/v1/templates/lint", "lint_template", "Check a template file").only_reads().body_up_to(max),
        read,
        lint,
    );
    api.add(
        Operation::get(
            "/v1/templates/{namespace}/{name}",
            "get_template",
            "A template's definition, of the latest version if none is named",
        ),
        read,
        get,
    );
    api.add(
        Operation::get(
            "/v1/templates/{namespace}/{name}/versions",
            "list_versions",
            "The versions of a template, the latest last",
        ),
        read,
        versions,
    );
    api.add(
        Operation::get("/v1/templates/{namespace}/{name}/diff", "diff_template", "What changed between two versions"),
        read,
        compare,
    );
}

async fn list(call: Call<Nothing, NamespaceQuery, Nothing>) -> Answer<Page<TemplateView>> {
    let named = own_namespaces(&call.who, Scope::TemplatesRead, call.query.namespace)?;
    let only = named.as_deref().and_then(|names| if let [one] = names { Some(one.as_str()) } else { None });
    let mut items = views::templates(&mut *call.database.conn().await?, only).await?;
    items.retain(|found| call.who.reaches(&found.namespace));
    Ok(Page { items, next: None }.into())
}

/// A template.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TemplatePath {
    /// Who owns it.
    namespace: String,
    /// Its name.
    name: String,
}

/// One version.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct VersionQuery {
    /// The latest if not given.
    version: Option<String>,
}

/// A template's definition.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TemplateDefinition {
    /// Who owns it.
    namespace: String,
    /// Its name.
    name: String,
    /// The version.
    version: String,
    /// The canonical JSON: durations in milliseconds, defaults left out.
    definition: Value,
}

async fn stored<Q, B>(call: &Call<TemplatePath, Q, B>, version: Option<&str>) -> Result<Value, Problem> {
    let TemplatePath { namespace, name } = &call.path;
    let unknown = || {
        let version = version.map_or_else(String::new, |version| format!(" {version}"));
        Problem::not_found(format!("template {namespace}/{name}{version}"))
    };
    if !call.who.reaches(namespace) {
        return Err(unknown());
    }
    let found = views::definition(&mut *call.database.conn().await?, namespace, name, version).await?;
    found.map(|(_, definition)| definition).ok_or_else(unknown)
}

async fn get(call: Call<TemplatePath, VersionQuery, Nothing>) -> Answer<TemplateDefinition> {
    let definition = stored(&call, call.query.version.as_deref()).await?;
    let version = definition.get("version").and_then(Value::as_str).unwrap_or_default().to_owned();
    let TemplatePath { namespace, name } = call.path;
    Ok(TemplateDefinition { namespace, name, version, definition }.into())
}

async fn versions(call: Call<TemplatePath, Nothing, Nothing>) -> Answer<Page<TemplateView>> {
    stored(&call, None).await?;
    let TemplatePath { namespace, name } = &call.path;
    let mut items = views::templates(&mut *call.database.conn().await?, Some(namespace)).await?;
    items.retain(|found| found.name == *name);
    Ok(Page { items, next: None }.into())
}

/// Two versions.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiffQuery {
    /// The earlier version.
    before: String,
    /// The later version.
    after: String,
}

async fn compare(call: Call<TemplatePath, DiffQuery, Nothing>) -> Answer<diff::Diff> {
    let read = |definition| -> Result<Template, Problem> {
        template::from_json(definition).map_err(|error| templates::TemplateError::from(error).into())
    };
    let before = read(stored(&call, Some(&call.query.before)).await?)?;
    let after = read(stored(&call, Some(&call.query.after)).await?)?;
    Ok(diff::diff(&before, &after).into())
}

/// A template file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TemplateFile {
    /// Its text, as docs/reference/templates.md describes it.
    yaml: String,
}

fn findings(problems: Vec<template::Problem>) -> Vec<Finding> {
    let finding = |problem: template::Problem| Finding {
        field: problem.key,
        line: Some(problem.line).filter(|line| *line > 0),
        detail: problem.message,
    };
    problems.into_iter().map(finding).collect()
}

/// What is wrong with a template file.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Lint {
    /// Whether nothing is.
    ok: bool,
    /// Each with its line and key.
    problems: Vec<Finding>,
}

async fn lint(call: Call<Nothing, Nothing, TemplateFile>) -> Answer<Lint> {
    Ok(match parse(call.body.yaml).await? {
        Ok(_) => Lint { ok: true, problems: Vec::new() },
        Err(problems) => Lint { ok: false, problems: findings(problems) },
    }
    .into())
}

/// A large file takes a moment of one thread, which must not be one that answers others.
async fn parse(yaml: String) -> Result<Result<Checked, Vec<template::Problem>>, Problem> {
    tokio::task::spawn_blocking(move || template::parse("template", &yaml)).await.map_err(|error| {
        tracing::error!(%error, "a template could not be read");
        crate::problem::INTERNAL.because("the server made a mistake; its log says more")
    })
}

/// What became of a registration.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Applied {
    /// Who owns it.
    namespace: String,
    /// Its name.
    name: String,
    /// The version.
    version: String,
    /// False: the same content was there already.
    is_new: bool,
}

async fn apply(call: Call<Nothing, Nothing, TemplateFile>) -> Answer<Applied> {
    let checked = match parse(call.body.yaml).await? {
        Ok(checked) => checked,
        Err(problems) => {
            let found = findings(problems);
            let first = found.first().map_or_else(String::new, |first| format!("{}: {}", first.field, first.detail));
            return Err(INVALID_REQUEST.because(format!("yaml: {first}")).field("yaml").findings(found));
        }
    };
    call.who.require(Scope::TemplatesWrite, &checked.template.namespace)?;
    let key = Some(call.who.name.as_str());
    let registered =
        tx::in_tx(call.state.pool(), async |conn| templates::apply(conn, &checked, key, key).await).await?;
    let Template { namespace, name, version, .. } = checked.template;
    Ok(Applied { namespace, name, version, is_new: registered.is_new }.into())
}
