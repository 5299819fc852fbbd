use std::collections::HashSet;

use super::*;

type Vars = &'static [(&'static str, &'static str)];

#[test]
fn the_document_lists_every_setting_as_it_is() {
    let document = include_str!("../../../../docs/reference/settings.md");
    for setting in SETTINGS {
        let variables: Vec<String> = setting.variables.iter().map(|name| format!("`{name}`")).collect();
        let row = format!(
            "| `{}` | {} | {} | {} |",
            setting.name,
            variables.join(", "),
            setting.default.replace('|', "\\|"),
            setting.about.replace('|', "\\|")
        );
        assert!(document.contains(&row), "docs/reference/settings.md lacks this row:\n{row}");
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
