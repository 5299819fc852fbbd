//! `tasker key`.

use std::time::Duration;

use anyhow::Context as _;
use chrono::{TimeDelta, Utc};
use serde_json::json;
use tasker_api::auth::keys::{self, KeyView};
use tasker_api::auth::{KeyRefused, KeySpec, Role, Scope, create_key};
use tasker_shared::template::parse_duration;

use crate::Global;
use crate::failure::{FAILED, NOT_FOUND, failure};
use crate::output::{self, Format, Table};
use crate::run;
use crate::run::actor;

/// Make and revoke the keys of the HTTP API.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Roles: a viewer looks but sees no payloads, an operator also submits and operates, an admin may do all.
Scopes take the place of the role's own; see docs/reference/api.md.

Examples:
  tasker key create grafana --role viewer --expires 90d
  tasker key create shop-backend --role operator --scope tasks:submit --scope tasks:read --namespace shop
  tasker key list
  tasker key revoke grafana")]
pub enum Key {
    /// Make a key and print it; it is shown this once
    Create(Create),
    /// List the keys; none shows its secret
    List,
    /// Revoke a key; a server that knows it refuses it within a second
    Revoke {
        /// Its name, or its id
        key: String,
    },
}

/// A key that is to be made.
#[derive(Debug, clap::Args)]
pub struct Create {
    /// Who uses it; the audit calls them so
    name: String,
    /// viewer, operator or admin
    #[arg(long)]
    role: Role,
    /// Only this of what the role may do; may be repeated
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<Scope>,
    /// Only in this namespace; may be repeated
    #[arg(long = "namespace", value_name = "NAMESPACE")]
    namespaces: Vec<String>,
    /// How long it is valid, such as 90d; until it is revoked if not given
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    expires: Option<Duration>,
}

impl Key {
    /// Runs it.
    pub async fn run(self, global: &Global) -> anyhow::Result<()> {
        let connected = run::connect(global).await?;
        let mut conn = connected.client.pool().acquire().await?;
        let who = actor().unwrap_or_else(|| "tasker".into());
        match self {
            Self::Create(create) => {
                let expires_at = match create.expires {
                    Some(lasts) => Some(Utc::now() + TimeDelta::from_std(lasts).context("--expires: is too long")?),
                    None => None,
                };
                let spec = KeySpec {
                    name: create.name,
                    role: create.role,
                    scopes: Some(create.scopes).filter(|scopes| !scopes.is_empty()),
                    namespaces: Some(create.namespaces).filter(|namespaces| !namespaces.is_empty()),
                    expires_at,
                };
                let key = create_key(&mut conn, &spec, &who).await.map_err(|error| match error {
                    KeyRefused::Rule(rule) => failure(FAILED, rule),
                    KeyRefused::Store(error) => error.into(),
                })?;
                if global.output == Format::Json {
                    return output::json(
                        &json!({"name": spec.name, "key_id": key.key_id, "key": key.key, "expires_at": expires_at}),
                    );
                }
                eprintln!("keep it safe: it is not shown again");
                output::line(key.key)
            }
            Self::List => list(global, &keys::list(&mut conn).await?),
            Self::Revoke { key } => {
                if !keys::revoke(&mut conn, &key, &who).await? {
                    return Err(failure(
                        NOT_FOUND,
                        format!("no valid key is called {key}; `tasker key list` shows those that are"),
                    ));
                }
                if global.output == Format::Json {
                    return output::json(&json!({"revoked": key}));
                }
                output::line(format!("{key} is revoked"))
            }
        }
    }
}

fn list(global: &Global, keys: &[KeyView]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        return output::json(&keys);
    }
    let mut table = Table::new(["NAME", "ID", "ROLE", "SCOPES", "NAMESPACES", "UNTIL (UTC)", "STATE"]);
    for key in keys {
        let state = match (key.revoked_at, key.expires_at) {
            (Some(_), _) => "revoked",
            (None, Some(at)) if at <= Utc::now() => "expired",
            _ => "valid",
        };
        table.row([
            output::cell(Some(&key.name)),
            key.key_id.clone(),
            key.role.clone(),
            key.scopes.as_ref().map_or("of the role".into(), |scopes| scopes.join(" ")),
            key.namespaces.as_ref().map_or("all".into(), |namespaces| namespaces.join(" ")),
            key.expires_at.map_or("-".into(), output::time),
            state.into(),
        ]);
    }
    table.print("there is no key; `tasker key create NAME --role viewer` makes one")
}
