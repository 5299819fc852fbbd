//! Where traces go: flag, environment, database, file, default, in that order.
//!
//! A pure function of what these say. A wrong value never stops a process
//! from working: it is a [`Warning`] and the next source is used, except for
//! an endpoint or a certificate, where guessing would send spans elsewhere.
//! Values of headers are never printed.

mod setting;
mod vars;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

pub use self::setting::{Key, SETTINGS, STORED, Setting};
use self::vars::{Vars, boolean, list, otlp_of_old_jaeger, pairs, query_url, resolve_endpoint};
use super::context::{DEFAULT_BAGGAGE_KEYS, Propagators};
use super::otlp::ServiceNames;
use crate::state_machine::duration::parse_duration;

/// What exports the spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exporter {
    /// OTLP to the endpoint.
    Otlp,
    /// The same: Jaeger speaks OTLP.
    Jaeger,
    /// A line of OTLP JSON an export.
    Stdout,
    /// The same, appended to a file.
    File,
    /// Nothing is exported.
    None,
}

impl Exporter {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Otlp, Self::Jaeger, Self::Stdout, Self::File, Self::None];

    /// Whether spans go over the network.
    pub fn is_remote(self) -> bool {
        matches!(self, Self::Otlp | Self::Jaeger)
    }
}

impl fmt::Display for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Otlp => "otlp",
            Self::Jaeger => "jaeger",
            Self::Stdout => "stdout",
            Self::File => "file",
            Self::None => "none",
        })
    }
}

impl FromStr for Exporter {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        // `console` is what OpenTelemetry calls standard output.
        let text = if text == "console" { "stdout" } else { text };
        Self::ALL.into_iter().find(|exporter| exporter.to_string() == text).ok_or(())
    }
}

/// How OTLP travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Protocol {
    Grpc,
    HttpProtobuf,
}

/// How requests are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Compression {
    None,
    Gzip,
}

/// Which live spans of ours exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// The tree and the user's spans.
    Tree,
    /// Also our live spans.
    Full,
}

/// Which areas have live spans of ours at detail `full`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Areas {
    /// SQL statements.
    pub db: bool,
    /// Requests to the HTTP API, and those of our client.
    pub http: bool,
    /// What we receive from queues and settle.
    pub messaging: bool,
}

impl Areas {
    /// Every area.
    pub const ALL: Self = Self { db: true, http: true, messaging: true };
}

impl fmt::Display for Areas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = [("db", self.db), ("http", self.http), ("messaging", self.messaging)]
            .into_iter()
            .filter_map(|(name, on)| on.then_some(name))
            .collect();
        f.write_str(if names.is_empty() { "none".to_owned() } else { names.join(",") }.as_str())
    }
}

impl FromStr for Areas {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut areas = Self::default();
        for name in list(text) {
            match name {
                "db" => areas.db = true,
                "http" => areas.http = true,
                "messaging" => areas.messaging = true,
                "none" => {}
                _ => return Err(()),
            }
        }
        Ok(areas)
    }
}

/// What an HTTP caller's context is worth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Incoming {
    /// The caller's span is the parent.
    #[default]
    Join,
    /// The trace is ours, and links to the caller's span.
    Link,
    /// The trace is ours.
    Ignore,
}

/// The batch processor of live spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveQueue {
    /// Spans held in memory.
    pub max_queue: usize,
    /// Spans per export.
    pub batch: usize,
    /// Longest wait.
    pub delay: Duration,
}

/// All settings of tracing of a process.
#[derive(Clone, PartialEq)]
pub struct TraceConfig {
    /// False: no spans are built and nothing is exported.
    pub enabled: bool,
    /// [`Exporter::None`] only when not enabled.
    pub exporter: Exporter,
    /// gRPC or HTTP.
    pub protocol: Protocol,
    /// With scheme. For HTTP the full URL that is posted to; for gRPC the origin.
    pub endpoint: String,
    /// Names in lower case, values decoded. Values are secrets.
    pub headers: Vec<(String, String)>,
    /// Longest wait for one export.
    pub timeout: Duration,
    /// Age at which spans that no receiver takes are given up; `None` keeps them for ever.
    pub max_export_lag: Option<Duration>,
    /// Of requests.
    pub compression: Compression,
    /// PEM file of the only authorities to trust.
    pub certificate: Option<String>,
    /// 0 to 1, for traces that begin here.
    pub sample_rate: f64,
    /// `service.name` of this process's live spans, if set.
    pub service_name: Option<String>,
    /// `service.name`s of the tree.
    pub service_names: ServiceNames,
    /// Of this process's live spans.
    pub resource_attributes: Vec<(String, String)>,
    /// What is read from and written to headers.
    pub propagators: Propagators,
    /// Baggage keys that are passed on.
    pub baggage_keys: Vec<String>,
    /// Which live spans exist.
    pub detail: Detail,
    /// Of detail `full`; see [`areas`](Self::areas).
    pub full_areas: Areas,
    /// Where [`Exporter::File`] appends.
    pub file: String,
    /// What an HTTP caller's context is worth.
    pub incoming: Incoming,
    /// Where traces are read from beside the log.
    pub query_url: Option<String>,
    /// The batch processor of live spans.
    pub live: LiveQueue,
}

impl Default for TraceConfig {
    /// Tracing off, and otherwise what an empty environment gives.
    fn default() -> Self {
        Self {
            enabled: false,
            exporter: Exporter::None,
            protocol: Protocol::HttpProtobuf,
            endpoint: "http://localhost:4318/v1/traces".into(),
            headers: Vec::new(),
            timeout: Duration::from_secs(10),
            max_export_lag: None,
            compression: Compression::None,
            certificate: None,
            sample_rate: 1.0,
            service_name: None,
            service_names: ServiceNames::default(),
            resource_attributes: Vec::new(),
            propagators: Propagators::default(),
            baggage_keys: DEFAULT_BAGGAGE_KEYS.map(String::from).to_vec(),
            detail: Detail::Tree,
            full_areas: Areas::ALL,
            file: "tasker-traces.jsonl".into(),
            incoming: Incoming::Join,
            query_url: None,
            live: LiveQueue { max_queue: 16_384, batch: 512, delay: Duration::from_secs(1) },
        }
    }
}

/// Leaves header values and credentials in the endpoint out.
impl fmt::Debug for TraceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceConfig")
            .field("enabled", &self.enabled)
            .field("protocol", &self.protocol)
            .field("endpoint", &self.printable_endpoint())
            .field("headers", &self.headers.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .field("timeout", &self.timeout)
            .field("compression", &self.compression)
            .field("certificate", &self.certificate)
            .field("sample_rate", &self.sample_rate)
            .field("service_name", &self.service_name)
            .field("service_names", &self.service_names)
            .field("propagators", &self.propagators)
            .field("detail", &self.detail)
            .field("exporter", &self.exporter)
            .finish_non_exhaustive()
    }
}

/// A value that was not used, in words for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning(pub String);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A value that must be corrected before traces can go anywhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The endpoint is no URL we can speak to.
    #[error("{variable}: {problem}; give a URL such as http://localhost:4318")]
    Endpoint {
        /// The variable, flag or key that named it.
        variable: String,
        /// What is wrong, without the value: it may hold a password.
        problem: &'static str,
    },
}

/// Where a value came from, the strongest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Source {
    Flag,
    Environment,
    Database,
    File,
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::Database => "database",
            Self::File => "file",
            Self::Default => "default",
        })
    }
}

/// What was stored: values by the names of settings.
pub type Stored = BTreeMap<String, String>;

/// Everything but the database that says where traces go.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Settings that the command line gave, with the names of their flags.
    pub flags: Vec<(Key, &'static str, String)>,
    /// The environment is this process's, not an empty one.
    pub environment: bool,
    /// The file's name, and what stands in its section `tracing`.
    pub file: Option<(String, Stored)>,
}

/// A configuration, and how it came about.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// What holds.
    pub config: TraceConfig,
    /// What was wrong with some source.
    pub warnings: Vec<Warning>,
    /// Where values came from that are not the default: the source, and the
    /// variable, flag or key.
    pub origins: Vec<(Key, Source, String)>,
}

impl Default for Resolved {
    /// Tracing off.
    fn default() -> Self {
        Self { config: TraceConfig::default(), warnings: Vec::new(), origins: Vec::new() }
    }
}

impl Resolved {
    /// Where the value of a setting came from.
    pub fn origin(&self, key: Key) -> (Source, &str) {
        let found = self.origins.iter().find(|(k, ..)| *k == key);
        found.map_or((Source::Default, ""), |(_, source, label)| (*source, label.as_str()))
    }
}

/// The environment variable that names the configuration file.
pub const CONFIG_FILE: &str = "TASKER_CONFIG";

impl Sources {
    /// These flags, the environment, and the file that `TASKER_CONFIG` names.
    /// A file that cannot be used is a warning.
    pub fn of_process(flags: Vec<(Key, &'static str, String)>) -> (Self, Vec<Warning>) {
        let mut warnings = Vec::new();
        let path = std::env::var(CONFIG_FILE).ok().filter(|path| !path.trim().is_empty());
        let file = path.and_then(|path| {
            let text = std::fs::read_to_string(&path).map_err(|e| format!("it cannot be read: {e}"));
            match text.and_then(|text| Self::section(&text)) {
                Ok(values) => Some((path, values)),
                Err(problem) => {
                    warnings.push(Warning(format!("{CONFIG_FILE}={path} is ignored: {problem}")));
                    None
                }
            }
        });
        (Self { flags, environment: true, file }, warnings)
    }

    /// The section `tracing` of a configuration file, as text by key.
    fn section(text: &str) -> Result<Stored, String> {
        #[derive(serde::Deserialize)]
        struct Document {
            #[serde(default)]
            tracing: BTreeMap<String, serde_json::Value>,
        }
        let document: Document =
            from_yaml(text).ok_or_else(|| "it must be YAML with a mapping `tracing`".to_owned())?;
        Ok(document
            .tracing
            .into_iter()
            .map(|(key, value)| {
                let value = match value {
                    serde_json::Value::String(text) => text,
                    serde_json::Value::Null => String::new(),
                    serde_json::Value::Array(list) => {
                        let words = list.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned));
                        words.collect::<Vec<_>>().join(",")
                    }
                    other => other.to_string(),
                };
                (key, value)
            })
            .collect())
    }

    /// The configuration that these sources and the database give.
    pub fn resolve(&self, stored: &Stored) -> Result<Resolved, ConfigError> {
        let environment = |name: &str| std::env::var(name).ok();
        let nothing = |_: &str| None;
        TraceConfig::resolve(self, if self.environment { &environment } else { &nothing }, stored)
    }
}

impl TraceConfig {
    /// The configuration of this process's environment and file.
    pub fn from_env() -> Result<(Self, Vec<Warning>), ConfigError> {
        let (sources, mut warnings) = Sources::of_process(Vec::new());
        let resolved = sources.resolve(&Stored::new())?;
        warnings.extend(resolved.warnings);
        Ok((resolved.config, warnings))
    }

    /// The configuration that `lookup` describes; variables that are set to
    /// nothing count as not set.
    pub fn from_vars(lookup: &dyn Fn(&str) -> Option<String>) -> Result<(Self, Vec<Warning>), ConfigError> {
        let resolved = Self::resolve(&Sources::default(), lookup, &Stored::new())?;
        Ok((resolved.config, resolved.warnings))
    }

    /// Whether a live span of ours of some area is made.
    pub fn areas(&self) -> Areas {
        match self.detail {
            Detail::Full if self.enabled => self.full_areas,
            _ => Areas::default(),
        }
    }

    fn resolve(
        sources: &Sources,
        lookup: &dyn Fn(&str) -> Option<String>,
        stored: &Stored,
    ) -> Result<Resolved, ConfigError> {
        let mut vars = Vars { sources, lookup, stored, warnings: Vec::new(), origins: Vec::new() };
        let vars = &mut vars;
        let default = Self::default();
        vars.unknown_keys();

        let mut endpoint = vars.endpoint();
        let exporter = vars.read(Key::Exporter, "otlp, jaeger, stdout, file or none", |text| text.parse().ok());
        let enabled = vars.enabled(exporter, endpoint.is_some());
        let protocol = vars.read(Key::Protocol, "grpc or http/protobuf", |text| match text {
            "grpc" => Some(Protocol::Grpc),
            "http/protobuf" => Some(Protocol::HttpProtobuf),
            _ => None,
        });
        let insecure = vars.read(Key::Insecure, "true or false", boolean).unwrap_or(false);
        if let Some((label, url)) = &mut endpoint
            && let Some(mapped) = otlp_of_old_jaeger(url)
        {
            vars.warn(format!("{label}: Jaeger's old collector URL is used as {mapped}, where it takes OTLP"));
            *url = mapped;
        }
        let (protocol, endpoint) = resolve_endpoint(endpoint, protocol, insecure)?;
        let config = Self {
            enabled,
            exporter: if enabled { exporter.unwrap_or(Exporter::Otlp) } else { Exporter::None },
            protocol,
            endpoint,
            headers: vars.headers(),
            timeout: vars.millis(Key::Timeout).unwrap_or(default.timeout),
            max_export_lag: vars
                .read(Key::MaxExportLag, "none, or a time such as 6h", |text| match text {
                    "none" => Some(None),
                    age => parse_duration(age).ok().map(Some),
                })
                .unwrap_or(default.max_export_lag),
            compression: vars
                .read(Key::Compression, "gzip or none", |text| match text {
                    "gzip" => Some(Compression::Gzip),
                    "none" => Some(Compression::None),
                    _ => None,
                })
                .unwrap_or(default.compression),
            certificate: vars.text(Key::Certificate),
            sample_rate: vars.sample_rate(),
            service_name: vars.text(Key::ServiceName),
            service_names: ServiceNames {
                orchestration: vars.text(Key::OrchestrationName).unwrap_or(default.service_names.orchestration),
                worker: vars.text(Key::WorkerName).unwrap_or(default.service_names.worker),
            },
            resource_attributes: vars.read(Key::ResourceAttributes, "key=value,key=value", pairs).unwrap_or_default(),
            propagators: vars.propagators(),
            baggage_keys: vars
                .text(Key::BaggageKeys)
                .map_or(default.baggage_keys, |t| list(&t).map(str::to_owned).collect()),
            detail: vars
                .read(Key::Detail, "tree or full", |text| match text {
                    "tree" => Some(Detail::Tree),
                    "full" => Some(Detail::Full),
                    _ => None,
                })
                .unwrap_or(default.detail),
            full_areas: vars
                .read(Key::Areas, "any of db, http, messaging, or none", |text| text.parse().ok())
                .unwrap_or(default.full_areas),
            file: vars.text(Key::File).unwrap_or(default.file),
            incoming: vars
                .read(Key::Incoming, "join, link or ignore", |text| match text {
                    "join" | "continue" => Some(Incoming::Join),
                    "link" => Some(Incoming::Link),
                    "ignore" => Some(Incoming::Ignore),
                    _ => None,
                })
                .unwrap_or_default(),
            query_url: vars
                .read(Key::QueryUrl, "none, or a URL with http:// or https://", query_url)
                .filter(|url| url != "none"),
            live: LiveQueue {
                max_queue: vars.count(Key::LiveQueue).unwrap_or(default.live.max_queue),
                batch: vars.count(Key::LiveBatch).unwrap_or(default.live.batch),
                delay: vars.millis(Key::LiveDelay).unwrap_or(default.live.delay),
            },
        };
        let (warnings, mut origins) = (std::mem::take(&mut vars.warnings), std::mem::take(&mut vars.origins));
        origins.sort_by_key(|(key, ..)| SETTINGS.iter().position(|s| s.key == *key));
        origins.dedup_by_key(|(key, ..)| *key);
        Ok(Resolved { config, warnings, origins })
    }

    /// Where spans go, for a person.
    pub fn destination(&self) -> String {
        match self.exporter {
            Exporter::Otlp | Exporter::Jaeger => self.printable_endpoint(),
            Exporter::Stdout => "standard output".into(),
            Exporter::File => self.file.clone(),
            Exporter::None => "nowhere".into(),
        }
    }

    /// The endpoint without user name, password and query.
    pub fn printable_endpoint(&self) -> String {
        let url = self.endpoint.split('?').next().unwrap_or_default();
        let Some((scheme, rest)) = url.split_once("://") else {
            return url.to_owned();
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let host = authority.rsplit('@').next().unwrap_or_default();
        format!("{scheme}://{host}{path}")
    }
}

/// Reads YAML, of which JSON is a part; without the feature `yaml` only JSON.
fn from_yaml<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
    #[cfg(feature = "yaml")]
    return serde_saphyr::from_str(text).ok();
    #[cfg(not(feature = "yaml"))]
    serde_json::from_str(text).ok()
}

#[cfg(test)]
mod tests;
