//! The table of settings: each with its name, its variables, its default and what it means. The
//! code and the documents read the same rows.

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
