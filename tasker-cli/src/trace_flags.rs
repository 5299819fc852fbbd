//! The flags that say where traces go, of every command that makes spans.

use tasker_shared::trace::config::Key;

/// Where traces go, on a command line.
#[derive(Debug, Default, Clone, clap::Args)]
pub struct TraceFlags {
    /// What exports spans; `jaeger` is OTLP to a Jaeger
    #[arg(long, value_name = "EXPORTER", value_parser = ["otlp", "jaeger", "stdout", "file", "none"], help_heading = "Traces")]
    pub exporter: Option<String>,
    /// URL of an OTLP receiver, such as `http://localhost:4318`, or `:4317` for gRPC
    #[arg(long, value_name = "URL", help_heading = "Traces")]
    pub otlp_endpoint: Option<String>,
    /// URL of a Jaeger, such as `http://localhost:4317`
    #[arg(long, value_name = "URL", conflicts_with = "otlp_endpoint", help_heading = "Traces")]
    pub jaeger_endpoint: Option<String>,
    /// Share of new traces that is recorded, 0 to 1
    #[arg(long, value_name = "SHARE", allow_hyphen_values = true, help_heading = "Traces")]
    pub sample_rate: Option<String>,
    /// service.name of live spans
    #[arg(long, value_name = "NAME", help_heading = "Traces")]
    pub service_name: Option<String>,
    /// Where the exporter `file` appends
    #[arg(long, value_name = "FILE", help_heading = "Traces")]
    pub trace_file: Option<String>,
}

impl TraceFlags {
    /// The settings that these give, with the flags' names.
    pub fn settings(&self) -> Vec<(Key, &'static str, String)> {
        let exporter = match (&self.exporter, &self.jaeger_endpoint, &self.otlp_endpoint, &self.trace_file) {
            (Some(exporter), ..) => Some((exporter.clone(), "--exporter")),
            (None, Some(_), ..) => Some(("jaeger".to_owned(), "--jaeger-endpoint")),
            (None, None, Some(_), _) => Some(("otlp".to_owned(), "--otlp-endpoint")),
            (None, None, None, Some(_)) => Some(("file".to_owned(), "--trace-file")),
            (None, None, None, None) => None,
        };
        let mut settings = Vec::new();
        if let Some((exporter, flag)) = exporter {
            settings.push((Key::Enabled, flag, (exporter != "none").to_string()));
            settings.push((Key::Exporter, flag, exporter));
        }
        for (key, flag, value) in [
            (Key::Endpoint, "--otlp-endpoint", &self.otlp_endpoint),
            (Key::Endpoint, "--jaeger-endpoint", &self.jaeger_endpoint),
            (Key::SampleRate, "--sample-rate", &self.sample_rate),
            (Key::ServiceName, "--service-name", &self.service_name),
            (Key::File, "--trace-file", &self.trace_file),
        ] {
            settings.extend(value.clone().map(|value| (key, flag, value)));
        }
        settings
    }
}
