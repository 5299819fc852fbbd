//! Where traces go: flag, environment, database, file, default, in that order.
//!
//! A pure function of what these say. A wrong value never stops a process
//! from working: it is a [`Warning`] and the next source is used, except for
//! an endpoint or a certificate, where guessing would send spans elsewhere.
//! Values of headers are never printed.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::context::{DEFAULT_BAGGAGE_KEYS, Propagators, percent_decode};
use super::otlp::ServiceNames;
use crate::template::parse_duration;

/// One setting: its name, its variables in order of precedence, its default, its meaning.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Names the setting in code.
    pub key: Key,
    /// Names it in the database and in the file.
    pub name: &'static str,
    /// The first one that is set to something valid wins.
    pub variables: &'static [&'static str],
    /// In words.
    pub default: &'static str,
    /// One sentence.
    pub about: &'static str,
}

/// The settings of [`SETTINGS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "described in SETTINGS")]
pub enum Key {
    Enabled,
    SdkDisabled,
    Exporter,
    Endpoint,
    Protocol,
    Headers,
    Timeout,
    MaxExportLag,
    Compression,
    Insecure,
    Certificate,
    SampleRate,
    Sampler,
    SamplerArg,
    ServiceName,
    OrchestrationName,
    WorkerName,
    ResourceAttributes,
    Propagators,
    BaggageKeys,
    Detail,
    Areas,
    File,
    Incoming,
    QueryUrl,
    LiveQueue,
    LiveBatch,
    LiveDelay,
}

const fn setting(
    key: Key,
    name: &'static str,
    variables: &'static [&'static str],
    default: &'static str,
    about: &'static str,
) -> Setting {
    Setting { key, name, variables, default, about }
}

/// What the database may hold. Not there: secrets, paths of one machine, and
/// what only a start can change.
pub const STORED: [Key; 18] = [
    Key::Enabled,
    Key::Exporter,
    Key::Endpoint,
    Key::Protocol,
    Key::Timeout,
    Key::MaxExportLag,
    Key::Compression,
    Key::SampleRate,
    Key::ServiceName,
    Key::OrchestrationName,
    Key::WorkerName,
    Key::Propagators,
    Key::BaggageKeys,
    Key::Detail,
    Key::Areas,
    Key::File,
    Key::Incoming,
    Key::QueryUrl,
];

impl Key {
    /// Its row.
    pub fn setting(self) -> &'static Setting {
        SETTINGS.iter().find(|setting| setting.key == self).expect("every key has its row")
    }

    /// The key that the database and the file call `name`.
    pub fn named(name: &str) -> Option<Self> {
        SETTINGS.iter().find(|setting| setting.name == name).map(|setting| setting.key)
    }
}

/// Every variable about tracing that is read, as the code reads it and the
/// documents list it. In each row: `TASKER_TRACING_*`, then the variable of the
/// OpenTelemetry specification for traces, then the generic one, then the
/// alias `TRACING_*`.
pub const SETTINGS: &[Setting] = &[
    setting(
        Key::Enabled,
        "enabled",
        &["TASKER_TRACING_ENABLED", "TRACING_ENABLED"],
        "true if an endpoint or `otlp` is set",
        "Whether spans are exported at all.",
    ),
    setting(
        Key::SdkDisabled,
        "sdk_disabled",
        &["OTEL_SDK_DISABLED"],
        "false",
        "true switches tracing off, unless TASKER_TRACING_ENABLED is true.",
    ),
    setting(
        Key::Exporter,
        "exporter",
        &["TASKER_TRACING_EXPORTER", "OTEL_TRACES_EXPORTER"],
        "otlp",
        "`otlp`, `jaeger` (OTLP to a Jaeger), `stdout` or `file` (a line of OTLP JSON an export), or `none`.",
    ),
    setting(
        Key::Endpoint,
        "endpoint",
        &[
            "TASKER_TRACING_ENDPOINT",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "TRACING_ENDPOINT",
        ],
        "http://localhost:4318, with gRPC :4317",
        "URL of the collector. HTTP appends /v1/traces, but not to the TRACES variant.",
    ),
    setting(
        Key::Protocol,
        "protocol",
        &["TASKER_TRACING_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"],
        "grpc if the endpoint's port is 4317, else http/protobuf",
        "`grpc` or `http/protobuf`.",
    ),
    setting(
        Key::Headers,
        "headers",
        &["TASKER_TRACING_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"],
        "none",
        "Sent with each export: `name=value,name=value`, values percent-encoded.",
    ),
    setting(
        Key::Timeout,
        "timeout_ms",
        &["TASKER_TRACING_TIMEOUT_MS", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"],
        "10000",
        "Longest wait for one export, in milliseconds.",
    ),
    setting(
        Key::MaxExportLag,
        "max_export_lag",
        &["TASKER_TRACING_MAX_EXPORT_LAG"],
        "none",
        "Age such as `6h` at which spans that no receiver takes are given up and counted; `none` keeps them for ever.",
    ),
    setting(
        Key::Compression,
        "compression",
        &["TASKER_TRACING_COMPRESSION", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"],
        "none",
        "`gzip` or `none`.",
    ),
    setting(
        Key::Insecure,
        "insecure",
        &["OTEL_EXPORTER_OTLP_TRACES_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE"],
        "false",
        "Whether a gRPC endpoint without a scheme is spoken to without TLS.",
    ),
    setting(
        Key::Certificate,
        "certificate",
        &["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"],
        "the web's certificate authorities",
        "PEM file with the only authorities to trust for https.",
    ),
    setting(
        Key::SampleRate,
        "sample_rate",
        &["TASKER_TRACING_SAMPLE_RATE"],
        "1.0",
        "Share of the live spans' own traces to record, 0 to 1. Stored with `trace enable --sample-rate` it is the share of new tasks, too.",
    ),
    setting(
        Key::Sampler,
        "sampler",
        &["OTEL_TRACES_SAMPLER"],
        "parentbased_always_on",
        "`always_on`, `always_off` or `traceidratio`, with or without `parentbased_`; a parent is always honoured.",
    ),
    setting(
        Key::SamplerArg,
        "sampler_arg",
        &["OTEL_TRACES_SAMPLER_ARG", "TRACING_SAMPLE_RATE"],
        "1.0",
        "The share for `traceidratio`. As TRACING_SAMPLE_RATE it counts without OTEL_TRACES_SAMPLER.",
    ),
    setting(
        Key::ServiceName,
        "service_name",
        &["TASKER_TRACING_SERVICE_NAME", "OTEL_SERVICE_NAME", "TRACING_SERVICE_NAME"],
        "tasker-worker or tasker-orchestration",
        "service.name of the live spans of this process. The tree has its own names.",
    ),
    setting(
        Key::OrchestrationName,
        "service_orchestration",
        &["TASKER_TRACING_SERVICE_ORCHESTRATION"],
        "tasker-orchestration",
        "service.name of the tree's spans, but for the worker's.",
    ),
    setting(
        Key::WorkerName,
        "service_worker",
        &["TASKER_TRACING_SERVICE_WORKER"],
        "tasker-worker",
        "service.name of handler.execution and result.submission.",
    ),
    setting(
        Key::ResourceAttributes,
        "resource_attributes",
        &["OTEL_RESOURCE_ATTRIBUTES"],
        "none",
        "Resource attributes of the live spans of this process.",
    ),
    setting(
        Key::Propagators,
        "propagators",
        &["OTEL_PROPAGATORS"],
        "tracecontext,baggage",
        "What is read from and written to headers: any of these, or `none`.",
    ),
    setting(
        Key::BaggageKeys,
        "baggage",
        &["TASKER_TRACING_BAGGAGE"],
        "correlation_id,task_uuid,namespace",
        "Baggage keys that are passed on.",
    ),
    setting(Key::Detail, "detail", &["TASKER_TRACING_DETAIL"], "tree", "`tree`, or `full` for our own live spans too."),
    setting(
        Key::Areas,
        "areas",
        &["TASKER_TRACING_AREAS"],
        "db,http,messaging",
        "Which live spans of ours `full` makes: any of `db`, `http`, `messaging`, or `none`.",
    ),
    setting(Key::File, "file", &["TASKER_TRACING_FILE"], "tasker-traces.jsonl", "Where the exporter `file` appends."),
    setting(
        Key::Incoming,
        "incoming",
        &["TASKER_TRACING_INCOMING"],
        "join",
        "What the HTTP API does with a caller's `traceparent`: `join` its trace, `link` to it, or `ignore` it.",
    ),
    setting(
        Key::QueryUrl,
        "query_url",
        &["TASKER_TRACING_QUERY_URL"],
        "none",
        "A backend that traces are read from beside the log, such as http://jaeger:16686 or http://tempo:3200.",
    ),
    setting(
        Key::LiveQueue,
        "live_queue",
        &["OTEL_BSP_MAX_QUEUE_SIZE"],
        "16384",
        "Live spans held in memory; more are dropped.",
    ),
    setting(Key::LiveBatch, "live_batch", &["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"], "512", "Live spans per export."),
    setting(
        Key::LiveDelay,
        "live_delay_ms",
        &["OTEL_BSP_SCHEDULE_DELAY"],
        "1000",
        "Longest wait of a live span, in milliseconds.",
    ),
];

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

/// Everything about tracing that a process is told.
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
            serde_saphyr::from_str(text).map_err(|_| "it must be YAML with a mapping `tracing`".to_owned())?;
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

/// The sources, what was wrong with what they gave, and which of them counted.
struct Vars<'a> {
    sources: &'a Sources,
    lookup: &'a dyn Fn(&str) -> Option<String>,
    stored: &'a Stored,
    warnings: Vec<Warning>,
    origins: Vec<(Key, Source, String)>,
}

/// A value that is set somewhere, trimmed.
struct Candidate {
    source: Source,
    /// The variable, flag or key.
    label: String,
    value: String,
}

impl Vars<'_> {
    /// What is set of a setting, in its precedence.
    fn raw(&self, key: Key) -> impl Iterator<Item = Candidate> + use<'_> {
        let row = key.setting();
        let flags = self.sources.flags.iter().filter(move |(flag, ..)| *flag == key);
        let flags = flags.map(|(_, name, value)| (Source::Flag, (*name).to_owned(), value.clone()));
        let variables = row.variables.iter().filter_map(|name| {
            let value = (self.lookup)(name)?;
            Some((Source::Environment, (*name).to_owned(), value))
        });
        let stored = self.stored.get(row.name).filter(|_| STORED.contains(&key));
        let stored = stored.map(|value| (Source::Database, format!("{} in the database", row.name), value.clone()));
        let file = self.sources.file.as_ref().and_then(|(path, values)| {
            let value = values.get(row.name)?;
            Some((Source::File, format!("tracing.{} in {path}", row.name), value.clone()))
        });
        flags.chain(variables).chain(stored).chain(file).filter_map(|(source, label, value)| {
            let value = value.trim().to_owned();
            (!value.is_empty()).then_some(Candidate { source, label, value })
        })
    }

    fn used(&mut self, key: Key, candidate: &Candidate) {
        self.origins.push((key, candidate.source, candidate.label.clone()));
    }

    fn text(&mut self, key: Key) -> Option<String> {
        let candidate = self.raw(key).next()?;
        self.used(key, &candidate);
        Some(candidate.value)
    }

    /// The endpoint, and what named it.
    fn endpoint(&mut self) -> Option<(String, String)> {
        let candidate = self.raw(Key::Endpoint).next()?;
        self.used(Key::Endpoint, &candidate);
        Some((candidate.label, candidate.value))
    }

    /// Keys of the database and the file that mean nothing.
    fn unknown_keys(&mut self) {
        let stored = self.stored.keys().map(|key| (key, "the database"));
        let file =
            self.sources.file.iter().flat_map(|(path, values)| values.keys().map(move |key| (key, path.as_str())));
        let unknown: Vec<String> = stored
            .chain(file)
            .filter(|(key, _)| Key::named(key).is_none())
            .map(|(key, place)| format!("tracing.{key} in {place} is ignored: there is no such setting"))
            .collect();
        self.warnings.extend(unknown.into_iter().map(Warning));
    }

    /// The first value that `parse` takes; one that it refuses is warned of.
    fn read<T>(&mut self, key: Key, shape: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let candidates: Vec<_> = self.raw(key).collect();
        for candidate in candidates {
            if let Some(parsed) = parse(&candidate.value) {
                self.used(key, &candidate);
                return Some(parsed);
            }
            let Candidate { label, value, .. } = candidate;
            let value: String = value.chars().take(100).collect();
            self.warn(format!("{label}={value} is ignored: it must be {shape}"));
        }
        None
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(Warning(text));
    }

    fn millis(&mut self, key: Key) -> Option<Duration> {
        let positive = |text: &str| text.parse().ok().filter(|ms| *ms > 0).map(Duration::from_millis);
        self.read(key, "a number of milliseconds above 0", positive)
    }

    fn count(&mut self, key: Key) -> Option<usize> {
        self.read(key, "a number above 0", |text| text.parse().ok().filter(|n| *n > 0))
    }

    fn enabled(&mut self, exporter: Option<Exporter>, endpoint_set: bool) -> bool {
        let enabled = Key::Enabled;
        let own = enabled.setting().variables[0];
        // `TASKER_*` is before `OTEL_*`, and `OTEL_*` before the alias and the database.
        let own_set = self.raw(enabled).next().is_some_and(|first| {
            (first.source == Source::Flag || first.label == own) && boolean(&first.value).is_some()
        });
        let asked = self.read(enabled, "true or false", boolean);
        if exporter == Some(Exporter::None) {
            return false;
        }
        if own_set {
            return asked == Some(true);
        }
        if self.read(Key::SdkDisabled, "true or false", boolean) == Some(true) {
            return false;
        }
        asked.unwrap_or(endpoint_set || exporter.is_some())
    }

    /// Header values never reach a warning.
    fn headers(&mut self) -> Vec<(String, String)> {
        let Some(candidate) = self.raw(Key::Headers).next() else {
            return Vec::new();
        };
        self.used(Key::Headers, &candidate);
        let Candidate { label: name, value: text, .. } = candidate;
        let mut headers = Vec::new();
        for (i, member) in list(&text).enumerate() {
            let header = member.split_once('=').and_then(|(key, value)| {
                let key = key.trim().to_ascii_lowercase();
                let value = percent_decode(value.trim())?;
                let valid = http::HeaderName::try_from(&key).is_ok() && http::HeaderValue::try_from(&value).is_ok();
                valid.then_some((key, value))
            });
            match header {
                Some(header) => headers.push(header),
                None => self.warn(format!("{name}: entry {} is ignored: it must be name=value", i + 1)),
            }
        }
        headers
    }

    fn sample_rate(&mut self) -> f64 {
        // OpenTelemetry's variables are part of the environment, so they come before what is stored.
        if let Some(rate) = self.rate(Key::SampleRate, |source| source <= Source::Environment) {
            return rate;
        }
        let sampler =
            self.read(Key::Sampler, "always_on, always_off or traceidratio, with or without parentbased_", |text| {
                match text.strip_prefix("parentbased_").unwrap_or(text) {
                    "always_on" => Some(Some(1.0)),
                    "always_off" => Some(Some(0.0)),
                    "traceidratio" => Some(None),
                    _ => None,
                }
            });
        match sampler {
            Some(Some(rate)) => rate,
            Some(None) => self.rate(Key::SamplerArg, |_| true).unwrap_or(1.0),
            None => self
                .rate(Key::SamplerArg, |_| true)
                .or_else(|| self.rate(Key::SampleRate, |source| source > Source::Environment))
                .unwrap_or(1.0),
        }
    }

    fn rate(&mut self, key: Key, from: fn(Source) -> bool) -> Option<f64> {
        let candidates: Vec<_> = self.raw(key).filter(|candidate| from(candidate.source)).collect();
        for candidate in candidates {
            let number = candidate.value.parse::<f64>().ok().filter(|rate| !rate.is_nan());
            let Some(rate) = number else {
                let Candidate { label, value, .. } = candidate;
                self.warn(format!("{label}={value} is ignored: it must be a number from 0 to 1"));
                continue;
            };
            self.used(key, &candidate);
            let clamped = rate.clamp(0.0, 1.0);
            if (rate - clamped).abs() > 0.0 {
                self.warn(format!("{}={rate} is used as {clamped}: it must be from 0 to 1", candidate.label));
            }
            return Some(clamped);
        }
        None
    }

    fn propagators(&mut self) -> Propagators {
        let Some(candidate) = self.raw(Key::Propagators).next() else {
            return Propagators::default();
        };
        self.used(Key::Propagators, &candidate);
        let Candidate { label: name, value: text, .. } = candidate;
        let mut found = Propagators { trace_context: false, baggage: false };
        let mut unknown = false;
        for entry in list(&text) {
            match entry {
                "tracecontext" => found.trace_context = true,
                "baggage" => found.baggage = true,
                "none" => {}
                other => {
                    unknown = true;
                    self.warn(format!("{name}: {other} is not supported; tracecontext, baggage and none are"));
                }
            }
        }
        let nothing = !found.trace_context && !found.baggage;
        if nothing && unknown { Propagators::default() } else { found }
    }
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|entry| !entry.is_empty())
}

fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// `None` as a whole when one entry is wrong, as the specification demands.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    list(text)
        .map(|entry| {
            let (key, value) = entry.split_once('=')?;
            let key = key.trim();
            (!key.is_empty()).then_some((key.to_owned(), percent_decode(value.trim())?))
        })
        .collect()
}

/// A base URL, or the word `none`.
fn query_url(text: &str) -> Option<String> {
    if text == "none" {
        return Some(text.to_owned());
    }
    let uri = text.parse::<http::Uri>().ok()?;
    let usable = matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty());
    usable.then(|| text.trim_end_matches('/').to_owned())
}

/// Where a Jaeger takes OTLP, if this is the URL of its collector of old.
fn otlp_of_old_jaeger(url: &str) -> Option<String> {
    let uri = url.parse::<http::Uri>().ok()?;
    let old = uri.port_u16() == Some(14268) || uri.path().trim_end_matches('/').ends_with("/api/traces");
    let authority = uri.authority()?.as_str();
    let host = authority.strip_suffix(":14268").unwrap_or(authority);
    let port = if uri.port_u16() == Some(14268) || uri.port_u16().is_none() { ":4318" } else { "" };
    old.then(|| format!("{}://{host}{port}", uri.scheme_str().unwrap_or("http")))
}

/// The protocol, and the URL it needs: with a scheme, and for HTTP with a path.
fn resolve_endpoint(
    given: Option<(String, String)>,
    protocol: Option<Protocol>,
    insecure: bool,
) -> Result<(Protocol, String), ConfigError> {
    let Some((variable, url)) = given else {
        return Ok(match protocol {
            Some(Protocol::Grpc) => (Protocol::Grpc, "http://localhost:4317".into()),
            _ => (Protocol::HttpProtobuf, TraceConfig::default().endpoint),
        });
    };
    let refuse = |problem| Err(ConfigError::Endpoint { variable: variable.clone(), problem });
    let with_scheme = if url.contains("://") { url.clone() } else { format!("http://{url}") };
    let Ok(uri) = with_scheme.parse::<http::Uri>() else {
        return refuse("this is not a URL");
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return refuse("only http:// and https:// are supported");
    }
    if uri.host().is_none_or(str::is_empty) {
        return refuse("the host is missing");
    }
    let protocol = protocol.unwrap_or(match uri.port_u16() {
        Some(4317) => Protocol::Grpc,
        _ => Protocol::HttpProtobuf,
    });
    match protocol {
        Protocol::Grpc if url.contains("://") => Ok((protocol, url)),
        Protocol::Grpc => Ok((protocol, format!("{}://{url}", if insecure { "http" } else { "https" }))),
        Protocol::HttpProtobuf if !url.contains("://") => refuse("an HTTP endpoint needs http:// or https://"),
        // The signal's own variable is taken as it is; every other names a base.
        Protocol::HttpProtobuf if variable == "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" => Ok((protocol, url)),
        Protocol::HttpProtobuf => {
            let (base, query) = url.split_at(url.find('?').unwrap_or(url.len()));
            let base = base.trim_end_matches('/');
            // A full URL in a variable of ours is understood, too.
            let complete = !variable.starts_with("OTEL_") && base.ends_with("/v1/traces");
            Ok((protocol, format!("{base}{}{query}", if complete { "" } else { "/v1/traces" })))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    type Vars = &'static [(&'static str, &'static str)];

    #[test]
    fn the_document_lists_every_setting_as_it_is() {
        let document = include_str!("../../../docs/telemetry.md");
        for setting in SETTINGS {
            let variables: Vec<String> = setting.variables.iter().map(|name| format!("`{name}`")).collect();
            let row = format!(
                "| `{}` | {} | {} | {} |",
                setting.name,
                variables.join(", "),
                setting.default.replace('|', "\\|"),
                setting.about.replace('|', "\\|")
            );
            assert!(document.contains(&row), "docs/telemetry.md lacks this row:\n{row}");
        }
    }

    fn read(vars: &[(&str, &str)]) -> (TraceConfig, Vec<String>) {
        let (config, warnings) = try_read(vars).unwrap();
        (config, warnings.into_iter().map(|w| w.0).collect())
    }

    fn try_read(vars: &[(&str, &str)]) -> Result<(TraceConfig, Vec<Warning>), ConfigError> {
        for (name, _) in vars {
            assert!(SETTINGS.iter().any(|s| s.variables.contains(name)), "{name} is in no row");
        }
        TraceConfig::from_vars(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    /// Reads without any warning.
    fn quiet(vars: &[(&str, &str)]) -> TraceConfig {
        let (config, warnings) = read(vars);
        assert_eq!(warnings, [""; 0], "{vars:?}");
        config
    }

    #[test]
    fn an_empty_environment_is_quiet_and_off() {
        assert_eq!(quiet(&[]), TraceConfig::default());
        assert_eq!(quiet(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " "), ("TRACING_ENABLED", "")]), TraceConfig::default());
    }

    #[test]
    fn every_variable_has_exactly_one_row_and_every_key_one() {
        let names: Vec<_> = SETTINGS.iter().flat_map(|s| s.variables).collect();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        assert_eq!(SETTINGS.iter().map(|s| s.key).collect::<HashSet<_>>().len(), SETTINGS.len());
        assert_eq!(SETTINGS.iter().map(|s| s.name).collect::<HashSet<_>>().len(), SETTINGS.len());
    }

    fn stored(values: &[(&str, &str)]) -> Stored {
        values.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_flag_comes_before_the_environment_and_that_before_the_database_the_file_and_the_default() {
        let environment = |name: &str| (name == "TRACING_ENDPOINT").then(|| "http://environment:1".to_owned());
        let nothing = |_: &str| None;
        let flags = vec![(Key::Endpoint, "--otlp-endpoint", "http://flag:1".to_owned())];
        let file = Some(("t.yaml".to_owned(), stored(&[("endpoint", "http://file:1"), ("detail", "full")])));
        let database = stored(&[("endpoint", "http://database:1"), ("timeout_ms", "5")]);
        let host = |sources: &Sources, env: bool, stored: &Stored| {
            let resolved = TraceConfig::resolve(sources, if env { &environment } else { &nothing }, stored).unwrap();
            assert_eq!(resolved.warnings, []);
            let (source, label) = resolved.origin(Key::Endpoint);
            (resolved.config.endpoint.clone(), source, label.to_owned())
        };
        let all = Sources { flags, environment: false, file: file.clone() };
        let no_flags = Sources { flags: Vec::new(), environment: false, file };
        let none = Sources::default();
        let answer = |url: &str, source, label: &str| (format!("{url}/v1/traces"), source, label.to_owned());
        assert_eq!(host(&all, true, &database), answer("http://flag:1", Source::Flag, "--otlp-endpoint"));
        assert_eq!(
            host(&no_flags, true, &database),
            answer("http://environment:1", Source::Environment, "TRACING_ENDPOINT")
        );
        assert_eq!(
            host(&no_flags, false, &database),
            answer("http://database:1", Source::Database, "endpoint in the database")
        );
        assert_eq!(
            host(&no_flags, false, &Stored::new()),
            answer("http://file:1", Source::File, "tracing.endpoint in t.yaml")
        );
        assert_eq!(host(&none, false, &Stored::new()), answer("http://localhost:4318", Source::Default, ""));

        let resolved = TraceConfig::resolve(&no_flags, &nothing, &database).unwrap();
        assert_eq!(resolved.config.timeout, Duration::from_millis(5));
        assert_eq!((resolved.config.detail, resolved.origin(Key::Detail).0), (Detail::Full, Source::File));
    }

    #[test]
    fn what_is_stored_switches_on_and_off_what_the_environment_leaves_open() {
        const E: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
        let with = |vars: &'static [(&str, &str)], values: &[(&str, &str)]| {
            let lookup = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            TraceConfig::resolve(&Sources::default(), &lookup, &stored(values)).unwrap().config
        };
        assert!(with(&[], &[("enabled", "true")]).enabled);
        assert!(!with(&[E], &[("enabled", "false")]).enabled);
        assert!(with(&[("TASKER_TRACING_ENABLED", "true")], &[("enabled", "false")]).enabled);
        assert!(!with(&[("OTEL_SDK_DISABLED", "true")], &[("enabled", "true")]).enabled);
        assert_eq!(with(&[], &[("enabled", "true"), ("exporter", "file"), ("file", "t")]).destination(), "t");
        assert!(!with(&[], &[("enabled", "true"), ("exporter", "none")]).enabled);
        // The sampler's variables are of the environment.
        let rate = |vars, values: &[(&str, &str)]| with(vars, values).sample_rate;
        assert!((rate(&[("OTEL_TRACES_SAMPLER", "always_off")], &[("sample_rate", "0.5")]) - 0.0).abs() < 1e-9);
        assert!((rate(&[], &[("sample_rate", "0.5")]) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn secrets_and_unknown_keys_in_the_database_are_not_used() {
        let values = stored(&[("headers", "authorization=hunter2"), ("certificate", "/c"), ("colour", "red")]);
        let resolved = TraceConfig::resolve(&Sources::default(), &|_| None, &values).unwrap();
        assert_eq!((resolved.config.headers.len(), resolved.config.certificate), (0, None));
        assert_eq!(resolved.warnings.len(), 1);
        assert!(resolved.warnings[0].0.starts_with("tracing.colour in the database is ignored"));
    }

    #[test]
    fn a_file_is_read_as_its_section_says() {
        let section = Sources::section(
            "tracing:\n  endpoint: http://c:4317\n  sample_rate: 0.5\n  areas: [db, http]\n  headers:\nother: 1\n",
        );
        let want = [("endpoint", "http://c:4317"), ("sample_rate", "0.5"), ("areas", "db,http"), ("headers", "")];
        assert_eq!(section.unwrap(), stored(&want));
        assert_eq!(Sources::section("other: {}").unwrap(), Stored::new());
        assert!(Sources::section("tracing: [").is_err());
    }

    #[test]
    fn exporters_are_read_and_written_by_one_name() {
        for exporter in Exporter::ALL {
            assert_eq!(exporter.to_string().parse(), Ok(exporter));
        }
        assert_eq!("console".parse(), Ok(Exporter::Stdout));
        assert_eq!("zipkin".parse::<Exporter>(), Err(()));
        assert_eq!("db, http".parse::<Areas>().unwrap().to_string(), "db,http");
        assert_eq!("none".parse(), Ok(Areas::default()));
    }

    #[test]
    fn a_jaeger_of_old_is_spoken_to_by_otlp_with_a_warning() {
        for (given, used) in [
            ("http://jaeger:14268/api/traces", "http://jaeger:4318/v1/traces"),
            ("http://jaeger:14268", "http://jaeger:4318/v1/traces"),
            ("http://jaeger/api/traces", "http://jaeger:4318/v1/traces"),
            ("http://jaeger:9999/api/traces", "http://jaeger:9999/v1/traces"),
        ] {
            let (config, warnings) = read(&[("TASKER_TRACING_EXPORTER", "jaeger"), ("TASKER_TRACING_ENDPOINT", given)]);
            assert_eq!((config.exporter, config.endpoint.as_str()), (Exporter::Jaeger, used));
            assert_eq!(warnings.len(), 1, "{warnings:?}");
        }
        let config = quiet(&[("TASKER_TRACING_EXPORTER", "jaeger"), ("TASKER_TRACING_ENDPOINT", "http://jaeger:4317")]);
        assert_eq!((config.protocol, config.endpoint.as_str()), (Protocol::Grpc, "http://jaeger:4317"));
    }

    #[test]
    fn every_row_is_read() {
        let asked = std::cell::RefCell::new(HashSet::new());
        let _ = TraceConfig::from_vars(&|name| {
            asked.borrow_mut().insert(name.to_owned());
            None
        });
        for name in SETTINGS.iter().flat_map(|s| s.variables) {
            assert!(asked.borrow().contains(*name), "{name} is documented and never read");
        }
    }

    #[test]
    fn tracing_is_on_when_someone_asked_for_it() {
        const E: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
        let table: &[(bool, Vars)] = &[
            (true, &[E]),
            (true, &[("TRACING_ENDPOINT", "http://c:4318")]),
            (true, &[("TASKER_TRACING_ENABLED", "true")]),
            (true, &[("TRACING_ENABLED", "1")]),
            (true, &[("OTEL_TRACES_EXPORTER", "otlp")]),
            (false, &[E, ("TRACING_ENABLED", "false")]),
            (false, &[E, ("TASKER_TRACING_ENABLED", "off")]),
            (false, &[E, ("OTEL_SDK_DISABLED", "true")]),
            (true, &[E, ("OTEL_SDK_DISABLED", "false")]),
            (false, &[E, ("OTEL_TRACES_EXPORTER", "none")]),
            (false, &[("TRACING_ENABLED", "true"), ("OTEL_SDK_DISABLED", "true")]),
            (true, &[("TASKER_TRACING_ENABLED", "true"), ("OTEL_SDK_DISABLED", "true")]),
            (true, &[("TASKER_TRACING_ENABLED", "true"), ("TRACING_ENABLED", "false")]),
            (false, &[("TASKER_TRACING_ENABLED", "true"), ("TASKER_TRACING_EXPORTER", "none")]),
            (true, &[E, ("TASKER_TRACING_EXPORTER", "otlp"), ("OTEL_TRACES_EXPORTER", "none")]),
        ];
        for (want, vars) in table {
            let config = quiet(vars);
            assert_eq!(config.enabled, *want, "{vars:?}");
            assert_eq!(config.exporter == Exporter::Otlp, *want, "{vars:?}");
        }
    }

    #[test]
    fn endpoints_and_protocols_follow_the_specification() {
        use Protocol::{Grpc, HttpProtobuf as Http};
        const GENERIC: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
        const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        const OURS: &str = "TASKER_TRACING_ENDPOINT";
        const GRPC: (&str, &str) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        const HTTP: (&str, &str) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        let table: &[(Protocol, &str, Vars)] = &[
            (Http, "http://localhost:4318/v1/traces", &[HTTP]),
            (Grpc, "http://localhost:4317", &[GRPC]),
            (Http, "http://c:4318/v1/traces", &[(GENERIC, "http://c:4318")]),
            (Http, "http://c:4318/v1/traces", &[(GENERIC, "http://c:4318/")]),
            (Http, "http://c/base/v1/traces?k=1", &[(GENERIC, "http://c/base?k=1")]),
            (Http, "http://c/v1/traces/v1/traces", &[(GENERIC, "http://c/v1/traces")]),
            (Http, "http://c/v1/traces", &[(OURS, "http://c/v1/traces")]),
            (Http, "http://c/v1/traces", &[("TRACING_ENDPOINT", "http://c")]),
            (Http, "http://c:4318", &[(TRACES, "http://c:4318")]),
            (Http, "http://a/x", &[(TRACES, "http://a/x"), (GENERIC, "http://b")]),
            (Http, "http://o/v1/traces", &[(OURS, "http://o"), (TRACES, "http://a")]),
            (Http, "http://g/v1/traces", &[(GENERIC, "http://g"), ("TRACING_ENDPOINT", "http://alias")]),
            (Grpc, "http://c:4317", &[(GENERIC, "http://c:4317")]),
            (Grpc, "https://c:4317", &[(GENERIC, "https://c:4317")]),
            (Http, "http://c:4317/v1/traces", &[(GENERIC, "http://c:4317"), HTTP]),
            (Grpc, "http://c:4318", &[(GENERIC, "http://c:4318"), GRPC]),
            (Grpc, "https://c:4317", &[(GENERIC, "c:4317")]),
            (Grpc, "http://c:4317", &[(GENERIC, "c:4317"), ("OTEL_EXPORTER_OTLP_INSECURE", "true")]),
            (
                Http,
                "http://c/v1/traces",
                &[(GENERIC, "http://c"), GRPC, ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")],
            ),
        ];
        for (protocol, endpoint, vars) in table {
            let config = quiet(vars);
            assert_eq!((config.protocol, config.endpoint.as_str()), (*protocol, *endpoint), "{vars:?}");
        }
    }

    #[test]
    fn an_endpoint_that_cannot_be_spoken_to_is_refused_without_printing_it() {
        for bad in ["://", "http://", "ftp://c", "unix:///s", "http://user:hunter2@ho st", "collector", "c:4318"] {
            let error = try_read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", bad)]).unwrap_err().to_string();
            assert!(error.starts_with("OTEL_EXPORTER_OTLP_ENDPOINT: "), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn values_come_from_the_first_variable_that_is_right() {
        let config = quiet(&[
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "250"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/etc/ca.pem"),
            ("OTEL_SERVICE_NAME", "payments"),
            ("TRACING_SERVICE_NAME", "alias"),
            ("TASKER_TRACING_SERVICE_WORKER", "w"),
            ("OTEL_RESOURCE_ATTRIBUTES", "a=1, b=x%20y"),
            ("OTEL_PROPAGATORS", "baggage"),
            ("TASKER_TRACING_BAGGAGE", "tenant, namespace"),
            ("TASKER_TRACING_DETAIL", "full"),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ]);
        assert_eq!(config.timeout, Duration::from_millis(250));
        assert_eq!(config.compression, Compression::Gzip);
        assert_eq!(config.certificate.as_deref(), Some("/etc/ca.pem"));
        assert_eq!(config.service_name.as_deref(), Some("payments"));
        assert_eq!(config.service_names.worker, "w");
        assert_eq!(config.service_names.orchestration, "tasker-orchestration");
        assert_eq!(config.resource_attributes, [("a".into(), "1".into()), ("b".into(), "x y".into())]);
        assert_eq!(config.propagators, Propagators { trace_context: false, baggage: true });
        assert_eq!(config.baggage_keys, ["tenant", "namespace"]);
        assert_eq!(config.detail, Detail::Full);
        assert_eq!(config.live.delay, Duration::from_millis(50));
    }

    #[test]
    fn wrong_values_are_told_and_the_next_source_is_used() {
        let (config, warnings) = read(&[
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "300"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_PROPAGATORS", "b3"),
            ("OTEL_RESOURCE_ATTRIBUTES", "a=1,nonsense"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ]);
        assert_eq!(config.timeout, Duration::from_millis(300));
        assert_eq!(config.protocol, Protocol::HttpProtobuf);
        assert_eq!(config.propagators, Propagators::default());
        assert_eq!(config.resource_attributes, []);
        assert_eq!(config.live.max_queue, 16_384);
        assert_eq!(warnings.len(), 5, "{warnings:?}");
        assert!(warnings.iter().any(|w| w.contains("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT=soon is ignored")));
    }

    #[test]
    fn the_sample_rate_has_one_order_and_is_clamped() {
        let table: &[(f64, usize, Vars)] = &[
            (1.0, 0, &[]),
            (0.25, 0, &[("TRACING_SAMPLE_RATE", "0.25")]),
            (1.0, 1, &[("TRACING_SAMPLE_RATE", "7")]),
            (0.0, 1, &[("TRACING_SAMPLE_RATE", "-1")]),
            (1.0, 1, &[("TRACING_SAMPLE_RATE", "NaN")]),
            (1.0, 1, &[("TRACING_SAMPLE_RATE", "half")]),
            (0.0, 0, &[("OTEL_TRACES_SAMPLER", "always_off"), ("TRACING_SAMPLE_RATE", "0.25")]),
            (0.5, 0, &[("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.5")]),
            (1.0, 0, &[("OTEL_TRACES_SAMPLER", "traceidratio")]),
            (1.0, 1, &[("OTEL_TRACES_SAMPLER", "jaeger_remote")]),
            (0.1, 0, &[("TASKER_TRACING_SAMPLE_RATE", "0.1"), ("OTEL_TRACES_SAMPLER", "always_off")]),
        ];
        for (want, warned, vars) in table {
            let (config, warnings) = read(vars);
            assert!((config.sample_rate - want).abs() < f64::EPSILON, "{vars:?}: {}", config.sample_rate);
            assert_eq!(warnings.len(), *warned, "{vars:?}: {warnings:?}");
        }
    }

    #[test]
    fn header_values_and_passwords_are_never_printed() {
        let (config, warnings) = read(&[
            ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20hunter2, broken hunter2, bad=hunter2%0A"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:hunter2@c:4318/x?token=hunter2"),
        ]);
        assert_eq!(config.headers, [("authorization".into(), "Bearer hunter2".into())]);
        assert_eq!(warnings.len(), 2);
        let printed = format!("{config:?} {warnings:?}");
        assert!(!printed.contains("hunter2"), "{printed}");
        assert!(printed.contains("http://c:4318/x/v1/traces"), "{printed}");
    }
}
