//! Reads one value after the other from flags, environment, database and file, and notes what was
//! wrong and what counted.

use std::time::Duration;

use super::{ConfigError, Exporter, Key, Protocol, STORED, Source, Sources, Stored, TraceConfig, Warning};
use crate::trace::context::{Propagators, percent_decode};

/// The sources, what was wrong with what they gave, and which of them counted.
pub(super) struct Vars<'a> {
    pub sources: &'a Sources,
    pub lookup: &'a dyn Fn(&str) -> Option<String>,
    pub stored: &'a Stored,
    pub warnings: Vec<Warning>,
    pub origins: Vec<(Key, Source, String)>,
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

    pub fn text(&mut self, key: Key) -> Option<String> {
        let candidate = self.raw(key).next()?;
        self.used(key, &candidate);
        Some(candidate.value)
    }

    /// The endpoint, and what named it.
    pub fn endpoint(&mut self) -> Option<(String, String)> {
        let candidate = self.raw(Key::Endpoint).next()?;
        self.used(Key::Endpoint, &candidate);
        Some((candidate.label, candidate.value))
    }

    /// Keys of the database and the file that mean nothing.
    pub fn unknown_keys(&mut self) {
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
    pub fn read<T>(&mut self, key: Key, shape: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
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

    pub fn warn(&mut self, text: String) {
        self.warnings.push(Warning(text));
    }

    pub fn millis(&mut self, key: Key) -> Option<Duration> {
        let positive = |text: &str| text.parse().ok().filter(|ms| *ms > 0).map(Duration::from_millis);
        self.read(key, "a number of milliseconds above 0", positive)
    }

    pub fn count(&mut self, key: Key) -> Option<usize> {
        self.read(key, "a number above 0", |text| text.parse().ok().filter(|n| *n > 0))
    }

    pub fn enabled(&mut self, exporter: Option<Exporter>, endpoint_set: bool) -> bool {
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
    pub fn headers(&mut self) -> Vec<(String, String)> {
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

    pub fn sample_rate(&mut self) -> f64 {
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

    pub fn rate(&mut self, key: Key, from: fn(Source) -> bool) -> Option<f64> {
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

    pub fn propagators(&mut self) -> Propagators {
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

pub(super) fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|entry| !entry.is_empty())
}

pub(super) fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// `None` as a whole when one entry is wrong, as the specification demands.
pub(super) fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    list(text)
        .map(|entry| {
            let (key, value) = entry.split_once('=')?;
            let key = key.trim();
            (!key.is_empty()).then_some((key.to_owned(), percent_decode(value.trim())?))
        })
        .collect()
}

/// A base URL, or the word `none`.
pub(super) fn query_url(text: &str) -> Option<String> {
    if text == "none" {
        return Some(text.to_owned());
    }
    let uri = text.parse::<http::Uri>().ok()?;
    let usable = matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty());
    usable.then(|| text.trim_end_matches('/').to_owned())
}

/// Where a Jaeger takes OTLP, if this is the URL of its collector of old.
pub(super) fn otlp_of_old_jaeger(url: &str) -> Option<String> {
    let uri = url.parse::<http::Uri>().ok()?;
    let old = uri.port_u16() == Some(14268) || uri.path().trim_end_matches('/').ends_with("/api/traces");
    let authority = uri.authority()?.as_str();
    let host = authority.strip_suffix(":14268").unwrap_or(authority);
    let port = if uri.port_u16() == Some(14268) || uri.port_u16().is_none() { ":4318" } else { "" };
    old.then(|| format!("{}://{host}{port}", uri.scheme_str().unwrap_or("http")))
}

/// The protocol, and the URL it needs: with a scheme, and for HTTP with a path.
pub(super) fn resolve_endpoint(
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
