//! `tasker template`.

use std::path::PathBuf;

use anyhow::Context as _;
use serde_json::{Value, json};
use sqlx::PgConnection;
use tasker_shared::store::templates::{self, TemplateError};
use tasker_shared::store::{tx, views};
use tasker_shared::template::{self, Checked, Template as Definition, format_duration};

use crate::Global;
use crate::failure::{FAILED, NOT_FOUND, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::run::actor;

/// Register and look at templates: the definitions of workflows.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  tasker template lint order.yaml
  tasker template schema > template.schema.json
  tasker template apply order.yaml
  tasker template show fulfillment/order@1.0.0
  tasker template diff fulfillment/order 1.0.0 1.1.0")]
pub enum Template {
    /// Register templates; a version that exists never changes
    Apply {
        /// YAML files
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Check template files; no database is needed
    Lint {
        /// YAML files
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Print the JSON Schema of a template file, for editors
    Schema,
    /// List the registered templates
    List {
        /// Of this namespace only
        #[arg(long)]
        namespace: Option<String>,
    },
    /// Show a registered template
    Show {
        /// NAMESPACE/NAME, or NAMESPACE/NAME@VERSION; the latest version if none is given
        template: TemplateName,
    },
    /// Say what changed between two versions; running tasks stay on theirs
    Diff {
        /// NAMESPACE/NAME
        template: TemplateName,
        /// The earlier version
        before: String,
        /// The later version
        after: String,
    },
}

/// `namespace/name` or `namespace/name@version`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateName {
    /// Who owns it.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The version asked for.
    pub version: Option<String>,
}

impl std::str::FromStr for TemplateName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, version) =
            text.split_once('@').map_or((text, None), |(place, version)| (place, Some(version.to_owned())));
        match place.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && version.as_deref() != Some("") => {
                Ok(Self { namespace: namespace.into(), name: name.into(), version })
            }
            _ => Err("write it as NAMESPACE/NAME or NAMESPACE/NAME@VERSION".into()),
        }
    }
}

impl std::fmt::Display for TemplateName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)?;
        self.version.iter().try_for_each(|version| write!(f, "@{version}"))
    }
}

impl Template {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Lint { files } => lint(global, &files),
            Self::Schema => output::line(serde_json::to_string_pretty(template::schema())?),
            Self::Apply { files } => apply(global, &files).await,
            Self::List { namespace } => list(global, namespace.as_deref()).await,
            Self::Show { template } => show(global, &template).await,
            Self::Diff { template, before, after } => diff(global, &template, before, after).await,
        }
    }
}

/// Reads files; problems of all of them come together.
fn read(files: &[PathBuf]) -> anyhow::Result<Result<Vec<Checked>, Vec<template::Problem>>> {
    let (mut good, mut problems) = (Vec::new(), Vec::new());
    for path in files {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
        match template::parse(&name, &text) {
            Ok(checked) => good.push(checked),
            Err(found) => problems.extend(found),
        }
    }
    Ok(if problems.is_empty() { Ok(good) } else { Err(problems) })
}

fn report(global: &Global, problems: &[template::Problem]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        let list: Vec<_> = problems
            .iter()
            .map(|problem| {
                json!({"file": problem.file, "line": problem.line, "column": problem.column, "key": problem.key, "message": problem.message})
            })
            .collect();
        output::json(&json!({"ok": false, "problems": list}))?;
    } else {
        for problem in problems {
            output::line(problem.to_string())?;
        }
    }
    let count = problems.len();
    Err(failure(FAILED, format!("{count} problem{}", if count == 1 { "" } else { "s" })))
}

fn lint(global: &Global, files: &[PathBuf]) -> anyhow::Result<()> {
    let checked = match read(files)? {
        Ok(checked) => checked,
        Err(problems) => return report(global, &problems),
    };
    if global.output == Format::Json {
        return output::json(&json!({"ok": true, "problems": []}));
    }
    for (path, Checked { template, .. }) in files.iter().zip(&checked) {
        let Definition { namespace, name, version, steps, .. } = template;
        output::line(format!("{}: ok, {namespace}/{name} {version} with {} steps", path.display(), steps.len()))?;
    }
    Ok(())
}

async fn apply(global: &Global, files: &[PathBuf]) -> anyhow::Result<()> {
    let checked = match read(files)? {
        Ok(checked) => checked,
        Err(problems) => return report(global, &problems),
    };
    let connected = run::connect(global).await?;
    let mut answers = Vec::new();
    let who = actor();
    for checked in &checked {
        let registered = tx::in_tx(connected.client.pool(), async |conn| {
            templates::apply(conn, checked, who.as_deref(), None).await
        })
        .await
        .map_err(|error| match error {
            refused @ TemplateError::Immutable { .. } => failure(FAILED, refused.to_string()),
            other => other.into(),
        })?;
        let Definition { namespace, name, version, .. } = &checked.template;
        if global.output == Format::Table {
            let what = if registered.is_new { "registered" } else { "was registered already, unchanged" };
            output::line(format!("{namespace}/{name} {version} {what}"))?;
        }
        answers.push(json!({"namespace": namespace, "name": name, "version": version, "is_new": registered.is_new}));
    }
    if global.output == Format::Json {
        output::json(&answers)?;
    }
    Ok(())
}

async fn list(global: &Global, namespace: Option<&str>) -> anyhow::Result<()> {
    let connected = run::connect(global).await?;
    let found = views::templates(&mut *connected.client.pool().acquire().await?, namespace).await?;
    if global.output == Format::Json {
        return output::json(&found);
    }
    let mut table = Table::new(["NAMESPACE", "NAME", "VERSION", "STEPS", "REGISTERED (UTC)"]);
    for template in found {
        table.row([
            template.namespace,
            template.name,
            template.version,
            template.steps.to_string(),
            output::time(template.created_at),
        ]);
    }
    table.print("no template is registered; `tasker template apply FILE` registers one")
}

/// The definition of a registered template, as it is stored.
async fn stored(conn: &mut PgConnection, wanted: &TemplateName) -> anyhow::Result<Value> {
    let found = views::definition(conn, &wanted.namespace, &wanted.name, wanted.version.as_deref()).await?;
    found.map(|(_, definition)| definition).ok_or_else(|| {
        failure(NOT_FOUND, format!("no template {wanted} is registered; `tasker template list` shows those that are"))
    })
}

async fn diff(global: &Global, name: &TemplateName, before: String, after: String) -> anyhow::Result<()> {
    let connected = run::connect(global).await?;
    let mut conn = connected.client.pool().acquire().await?;
    let version = |version| TemplateName { version: Some(version), ..name.clone() };
    let before = template::from_json(stored(&mut conn, &version(before)).await?)?;
    let after = template::from_json(stored(&mut conn, &version(after)).await?)?;
    let diff = template::diff::diff(&before, &after);
    match global.output {
        Format::Json => output::json(&diff),
        Format::Table if diff.is_empty() => output::line("nothing but the version differs"),
        Format::Table => output::line(diff.to_string().trim_end()),
    }
}

async fn show(global: &Global, wanted: &TemplateName) -> anyhow::Result<()> {
    let connected = run::connect(global).await?;
    let mut conn = connected.client.pool().acquire().await?;
    let definition = stored(&mut conn, wanted).await?;
    if global.output == Format::Json {
        return output::json(&definition);
    }
    let template = template::from_json(definition)?;
    let Definition { namespace, name, version, description, steps, .. } = &template;
    output::line(format!("{namespace}/{name} {version}"))?;
    if !description.is_empty() {
        output::line(description)?;
    }
    let mut table = Table::new(["STEP", "HANDLER", "QUEUE", "DEPENDS ON", "ATTEMPTS", "RUN TIMEOUT"]);
    for step in steps {
        table.row([
            step.name.clone(),
            step.handler.clone(),
            template::step_queue(namespace, step),
            if step.depends_on.is_empty() { "-".into() } else { step.depends_on.join(", ") },
            step.retry.max_attempts.to_string(),
            format_duration(step.timeouts.run),
        ]);
    }
    table.print("no step")
}

#[cfg(test)]
mod tests {
    use super::TemplateName;

    #[test]
    fn a_template_is_named_with_its_namespace() {
        let name: TemplateName = "shop/order@1.2.0".parse().unwrap();
        assert_eq!((&*name.namespace, &*name.name, name.version.as_deref()), ("shop", "order", Some("1.2.0")));
        assert_eq!("shop/order".parse::<TemplateName>().unwrap().version, None);
        for bad in ["order", "/order", "shop/", "shop/order@"] {
            assert!(bad.parse::<TemplateName>().is_err(), "{bad}");
        }
    }
}
