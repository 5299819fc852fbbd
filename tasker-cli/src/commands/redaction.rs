//! `tasker redaction`.

use std::path::PathBuf;

use serde_json::json;
use tasker_shared::redact::{self, Definition, Policy};
use tasker_shared::store::redaction;

use crate::Global;
use crate::output::{self, Format};
use crate::run;
use crate::run::actor;

/// Say what is hidden from logs, traces and screens.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  tasker redaction show
  tasker redaction set policy.yaml
  echo 'postgres://app:secret@db/shop' | tasker redaction test

A policy file:
  version: shop-3
  rules:
    - {path: $.customer.email, do: hash}
    - {path: '$..iban', do: mask}
    - {attribute: 'http.request.header.*', do: deny}
    - {attribute: order_token, do: allow}
The first rule that fits decides, then the built-in ones (`defaults: false` leaves those out).
Processes read it when they start; TASKER_REDACTION_FILE goes before the database.")]
pub enum Redaction {
    /// Show the policy that is used
    Show,
    /// Store a policy for every process
    Set {
        /// YAML or JSON
        file: PathBuf,
    },
    /// Use the built-in policy again
    Reset,
    /// Show what would be left of the text or JSON on stdin
    Test,
}

impl Redaction {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        match self {
            Self::Show => output::json(redact::policy().definition()),
            Self::Set { file } => {
                let policy = Policy::read(&file)?;
                let definition = serde_json::to_value(policy.definition())?;
                redaction::set(&mut conn, Some(&definition), actor().as_deref()).await?;
                said(global, policy.definition())
            }
            Self::Reset => {
                redaction::set(&mut conn, None, actor().as_deref()).await?;
                said(global, &Definition::default())
            }
            Self::Test => output::line(std::io::read_to_string(std::io::stdin())?.trim_end()),
        }
    }
}

fn said(global: &Global, definition: &Definition) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&json!({"version": definition.version, "rules": definition.rules.len()}));
    }
    output::line(format!(
        "policy {} is stored; processes use it when they start next",
        output::cell(Some(&definition.version))
    ))
}
