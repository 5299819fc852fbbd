use super::*;

fn text(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    text
}

#[test]
fn a_slow_bucket_names_a_sampled_trace_and_no_other() {
    let mut registry = Registry::default();
    let duration: Bounded<OfNamespace, Histogram> =
        family(&mut registry, "d", "Help", Some(Unit::Seconds), || histogram(&[0.1, 1.0]));
    let shop = duration.of(&OfNamespace { namespace: "shop".into() });
    shop.observe(0.05, Exemplar::of([7; 16], 0), None);
    shop.observe(0.5, Exemplar::of([0xab; 16], 1), None);
    let text = text(&registry);
    let bucket = |le: &str| text.lines().find(|line| line.contains(&format!("le=\"{le}\""))).unwrap().to_owned();
    assert_eq!(bucket("0.1"), "d_seconds_bucket{le=\"0.1\",namespace=\"shop\"} 1");
    assert_eq!(
        bucket("1.0"),
        format!("d_seconds_bucket{{le=\"1.0\",namespace=\"shop\"}} 2 # {{trace_id=\"{}\"}} 0.5", "ab".repeat(16))
    );
}

#[test]
fn a_family_stops_growing_and_counts_the_rest_as_other() {
    let mut registry = Registry::default();
    let ended: Bounded<StepEnd, Counter> = family(&mut registry, "ended", "Help", None, Counter::default);
    for n in 0..5000 {
        ended.of(&StepEnd { namespace: format!("n{n}").into(), state: "complete" }).inc();
    }
    let text = text(&registry);
    assert_eq!(text.lines().filter(|line| line.starts_with("ended_total{")).count(), 1001);
    assert!(text.contains("ended_total{namespace=\"other\",state=\"complete\"} 4000"), "{text}");
}

#[test]
fn names_follow_the_conventions_and_help_is_there() {
    let mut registry_text = String::new();
    prometheus_client::encoding::text::encode(&mut registry_text, &metrics().registry).unwrap();
    for line in registry_text.lines().filter(|line| line.starts_with("# TYPE")) {
        let name = line.split(' ').nth(2).unwrap();
        assert!(name.starts_with("tasker_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
        assert!(!name.ends_with("_total"), "the encoder adds it: {line}");
        assert!(!["_ms", "_milliseconds", "_minutes"].iter().any(|unit| name.ends_with(unit)), "base units: {line}");
    }
}
