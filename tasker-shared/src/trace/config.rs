//! Where traces go: environment and defaults.
//!
//! A pure function of a variable lookup. A wrong value never stops a process
//! from working: it is a [`Warning`] and the next source is used, except for
//! an endpoint or a certificate, where guessing would send spans elsewhere.
//! Values of headers are never printed.

use std::fmt;
use std::time::Duration;

use super::context::{DEFAULT_BAGGAGE_KEYS, Propagators, percent_decode};
use super::otlp::ServiceNames;
use crate::template::parse_duration;

/// One setting: its variables in order of precedence, its default, its meaning.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Names the setting in code.
    pub key: Key,
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
    LiveQueue,
    LiveBatch,
    LiveDelay,
}

const fn setting(key: Key, variables: &'static [&'static str], default: &'static str, about: &'static str) -> Setting {
    Setting { key, variables, default, about }
}

/// Every variable about tracing that is read, as the code reads it and the
/// documents list it. In each row: `TASKER_TRACING_*`, then the variable of the
/// OpenTelemetry specification for traces, then the generic one, then the
/// alias `TRACING_*`.
pub const SETTINGS: &[Setting] = &[
    setting(
        Key::Enabled,
        &["TASKER_TRACING_ENABLED", "TRACING_ENABLED"],
        "true if an endpoint or `otlp` is set",
        "Whether spans are exported at all.",
    ),
    setting(
        Key::SdkDisabled,
        &["OTEL_SDK_DISABLED"],
        "false",
        "true switches tracing off, unless TASKER_TRACING_ENABLED is true.",
    ),
    setting(
        Key::Exporter,
        &["TASKER_TRACING_EXPORTER", "OTEL_TRACES_EXPORTER"],
        "otlp",
        "`otlp`, or `none` to export nothing.",
    ),
    setting(
        Key::Endpoint,
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
        &["TASKER_TRACING_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"],
        "grpc if the endpoint's port is 4317, else http/protobuf",
        "`grpc` or `http/protobuf`.",
    ),
    setting(
        Key::Headers,
        &["TASKER_TRACING_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"],
        "none",
        "Sent with each export: `name=value,name=value`, values percent-encoded.",
    ),
    setting(
        Key::Timeout,
        &["TASKER_TRACING_TIMEOUT_MS", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"],
        "10000",
        "Longest wait for one export, in milliseconds.",
    ),
    setting(
        Key::MaxExportLag,
        &["TASKER_TRACING_MAX_EXPORT_LAG"],
        "none",
        "Age such as `6h` at which spans that no receiver takes are given up and counted; `none` keeps them for ever.",
    ),
    setting(
        Key::Compression,
        &["TASKER_TRACING_COMPRESSION", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"],
        "none",
        "`gzip` or `none`.",
    ),
    setting(
        Key::Insecure,
        &["OTEL_EXPORTER_OTLP_TRACES_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE"],
        "false",
        "Whether a gRPC endpoint without a scheme is spoken to without TLS.",
    ),
    setting(
        Key::Certificate,
        &["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"],
        "the web's certificate authorities",
        "PEM file with the only authorities to trust for https.",
    ),
    setting(
        Key::SampleRate,
        &["TASKER_TRACING_SAMPLE_RATE"],
        "1.0",
        "Share of the live spans' own traces to record, 0 to 1. A task's tree follows its caller's sampled flag, and is recorded without one.",
    ),
    setting(
        Key::Sampler,
        &["OTEL_TRACES_SAMPLER"],
        "parentbased_always_on",
        "`always_on`, `always_off` or `traceidratio`, with or without `parentbased_`; a parent is always honoured.",
    ),
    setting(
        Key::SamplerArg,
        &["OTEL_TRACES_SAMPLER_ARG", "TRACING_SAMPLE_RATE"],
        "1.0",
        "The share for `traceidratio`. As TRACING_SAMPLE_RATE it counts without OTEL_TRACES_SAMPLER.",
    ),
    setting(
        Key::ServiceName,
        &["TASKER_TRACING_SERVICE_NAME", "OTEL_SERVICE_NAME", "TRACING_SERVICE_NAME"],
        "tasker-worker or tasker-orchestration",
        "service.name of the live spans of this process. The tree has its own names.",
    ),
    setting(
        Key::OrchestrationName,
        &["TASKER_TRACING_SERVICE_ORCHESTRATION"],
        "tasker-orchestration",
        "service.name of the tree's spans, but for the worker's.",
    ),
    setting(
        Key::WorkerName,
        &["TASKER_TRACING_SERVICE_WORKER"],
        "tasker-worker",
        "service.name of handler.execution and result.submission.",
    ),
    setting(
        Key::ResourceAttributes,
        &["OTEL_RESOURCE_ATTRIBUTES"],
        "none",
        "Resource attributes of the live spans of this process.",
    ),
    setting(
        Key::Propagators,
        &["OTEL_PROPAGATORS"],
        "tracecontext,baggage",
        "What is read from and written to headers: any of these, or `none`.",
    ),
    setting(
        Key::BaggageKeys,
        &["TASKER_TRACING_BAGGAGE"],
        "correlation_id,task_uuid,namespace",
        "Baggage keys that are passed on.",
    ),
    setting(Key::Detail, &["TASKER_TRACING_DETAIL"], "tree", "`tree`, or `full` for our own live spans too."),
    setting(Key::LiveQueue, &["OTEL_BSP_MAX_QUEUE_SIZE"], "16384", "Live spans held in memory; more are dropped."),
    setting(Key::LiveBatch, &["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"], "512", "Live spans per export."),
    setting(Key::LiveDelay, &["OTEL_BSP_SCHEDULE_DELAY"], "1000", "Longest wait of a live span, in milliseconds."),
];

/// What exports the spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Exporter {
    Otlp,
    None,
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
        /// The variable that named it.
        variable: &'static str,
        /// What is wrong, without the value: it may hold a password.
        problem: &'static str,
    },
}

impl TraceConfig {
    /// The configuration of this process's environment.
    pub fn from_env() -> Result<(Self, Vec<Warning>), ConfigError> {
        Self::from_vars(&|name| std::env::var(name).ok())
    }

    /// The configuration that `lookup` describes; variables that are set to
    /// nothing count as not set. A command line puts its flags in front by
    /// answering for the `TASKER_TRACING_*` names.
    pub fn from_vars(lookup: &dyn Fn(&str) -> Option<String>) -> Result<(Self, Vec<Warning>), ConfigError> {
        let mut vars = Vars { lookup, warnings: Vec::new() };
        let vars = &mut vars;
        let default = Self::default();

        let endpoint = vars.raw(Key::Endpoint).next();
        let exporter = vars.read(Key::Exporter, "otlp or none", |text| match text {
            "otlp" => Some(Exporter::Otlp),
            "none" => Some(Exporter::None),
            _ => None,
        });
        let enabled = vars.enabled(exporter, endpoint.is_some());
        let protocol = vars.read(Key::Protocol, "grpc or http/protobuf", |text| match text {
            "grpc" => Some(Protocol::Grpc),
            "http/protobuf" => Some(Protocol::HttpProtobuf),
            _ => None,
        });
        let insecure = vars.read(Key::Insecure, "true or false", boolean).unwrap_or(false);
        let (protocol, endpoint) = resolve_endpoint(endpoint, protocol, insecure)?;
        let config = Self {
            enabled,
            exporter: if enabled { Exporter::Otlp } else { Exporter::None },
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
            live: LiveQueue {
                max_queue: vars.count(Key::LiveQueue).unwrap_or(default.live.max_queue),
                batch: vars.count(Key::LiveBatch).unwrap_or(default.live.batch),
                delay: vars.millis(Key::LiveDelay).unwrap_or(default.live.delay),
            },
        };
        Ok((config, std::mem::take(&mut vars.warnings)))
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

/// A lookup, and what was wrong with what it gave.
struct Vars<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    warnings: Vec<Warning>,
}

impl Vars<'_> {
    /// The variables of a setting that are set, trimmed, in their precedence.
    fn raw(&self, key: Key) -> impl Iterator<Item = (&'static str, String)> + use<'_> {
        let row = SETTINGS.iter().find(|s| s.key == key).expect("every key has its row");
        row.variables.iter().filter_map(|name| {
            let value = (self.lookup)(name)?.trim().to_owned();
            (!value.is_empty()).then_some((*name, value))
        })
    }

    fn text(&self, key: Key) -> Option<String> {
        self.raw(key).next().map(|(_, value)| value)
    }

    /// The first value that `parse` takes; one that it refuses is warned of.
    fn read<T>(&mut self, key: Key, shape: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let candidates: Vec<_> = self.raw(key).collect();
        for (name, value) in candidates {
            if let Some(parsed) = parse(&value) {
                return Some(parsed);
            }
            self.warn(format!("{name}={value} is ignored: it must be {shape}"));
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
        let own = SETTINGS.iter().find(|s| s.key == enabled).map_or("", |s| s.variables[0]);
        let own_set = self.raw(enabled).next().is_some_and(|(name, value)| name == own && boolean(&value).is_some());
        let asked = self.read(enabled, "true or false", boolean);
        // `TASKER_*` is before `OTEL_*`, and `OTEL_*` before the alias.
        if own_set {
            return asked == Some(true) && exporter != Some(Exporter::None);
        }
        if self.read(Key::SdkDisabled, "true or false", boolean) == Some(true) || exporter == Some(Exporter::None) {
            return false;
        }
        asked.unwrap_or(endpoint_set || exporter == Some(Exporter::Otlp))
    }

    /// Header values never reach a warning.
    fn headers(&mut self) -> Vec<(String, String)> {
        let Some((name, text)) = self.raw(Key::Headers).next() else {
            return Vec::new();
        };
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
        if let Some(rate) = self.rate(Key::SampleRate) {
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
            _ => self.rate(Key::SamplerArg).unwrap_or(1.0),
        }
    }

    fn rate(&mut self, key: Key) -> Option<f64> {
        let name = self.raw(key).next().map_or("", |(name, _)| name);
        let number = |text: &str| text.parse::<f64>().ok().filter(|rate| !rate.is_nan());
        let rate = self.read(key, "a number from 0 to 1", number)?;
        let clamped = rate.clamp(0.0, 1.0);
        if (rate - clamped).abs() > 0.0 {
            self.warn(format!("{name}={rate} is used as {clamped}: it must be from 0 to 1"));
        }
        Some(clamped)
    }

    fn propagators(&mut self) -> Propagators {
        let Some((name, text)) = self.raw(Key::Propagators).next() else {
            return Propagators::default();
        };
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

/// The protocol, and the URL it needs: with a scheme, and for HTTP with a path.
fn resolve_endpoint(
    given: Option<(&'static str, String)>,
    protocol: Option<Protocol>,
    insecure: bool,
) -> Result<(Protocol, String), ConfigError> {
    let Some((variable, url)) = given else {
        return Ok(match protocol {
            Some(Protocol::Grpc) => (Protocol::Grpc, "http://localhost:4317".into()),
            _ => (Protocol::HttpProtobuf, TraceConfig::default().endpoint),
        });
    };
    let refuse = |problem| Err(ConfigError::Endpoint { variable, problem });
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
                "| {} | {} | {} |",
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
