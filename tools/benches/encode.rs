//! Prints what one span costs to encode, in nanoseconds and bytes.
//!
//! `cargo bench -p tasker-benches --bench encode`

use std::hint::black_box;
use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};
use tasker_shared::trace::otlp::{Encoder, ServiceNames};
use tasker_shared::trace::span::{Kind, Link, Service, Span, TaskSpans, Value};

const TASKS: u64 = 2_000;
const SPANS_PER_TASK: u64 = 75;
const REQUEST_BYTES: usize = 1 << 20;

fn main() {
    let tasks: Vec<_> = (0..TASKS).map(task).collect();
    let mut encoder = Encoder::new(&ServiceNames::default());
    let mut best = f64::INFINITY;
    let mut bytes = 0;
    for _ in 0..10 {
        bytes = 0;
        let began = Instant::now();
        for task in &tasks {
            encoder.push(black_box(task));
            if encoder.bytes_len() > REQUEST_BYTES {
                bytes += black_box(encoder.finish()).len();
            }
        }
        bytes += black_box(encoder.finish()).len();
        #[expect(clippy::cast_precision_loss, reason = "a count far below 2^53")]
        let per_span = began.elapsed().as_nanos() as f64 / (TASKS * SPANS_PER_TASK) as f64;
        best = best.min(per_span);
    }
    println!("{best:.0} ns/span, {} bytes/span, best of 10", bytes as u64 / (TASKS * SPANS_PER_TASK));
}

/// Roughly the spans of a linear task of five steps.
fn task(n: u64) -> TaskSpans {
    let at = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::microseconds(1_790_000_000_000_000);
    let spans = (0..SPANS_PER_TASK)
        .map(|i| Span {
            id: (n * SPANS_PER_TASK + i + 1).to_be_bytes(),
            parent: Some([3; 8]),
            parent_is_remote: false,
            name: "step.state_transition",
            kind: Kind::Internal,
            service: if i % 5 == 0 { Service::Worker } else { Service::Orchestration },
            start: at,
            end: at + TimeDelta::microseconds(900),
            attributes: vec![
                ("step_uuid", Value::from("0199a7c2-3b1e-7c4d-9f00-1234567890ab".to_owned())),
                ("from_state", Value::from("enqueued")),
                ("to_state", Value::from("in_progress")),
                ("event", Value::from("Claim")),
                ("attempt_number", Value::Int(1)),
            ],
            links: if i % 7 == 0 { vec![Link { trace_id: [1; 16], span_id: [2; 8] }] } else { vec![] },
            events: vec![],
            error: None,
            settled_at: at,
        })
        .collect();
    TaskSpans {
        trace_id: u128::from(n + 1).to_be_bytes(),
        trace_flags: 1,
        tracestate: None,
        common: vec![
            ("correlation_id", Value::from(format!("order-{n}"))),
            ("task_uuid", Value::from(format!("0199a7c2-3b1e-7c4d-9f00-{n:012}"))),
            ("namespace", Value::from("fulfillment")),
        ],
        spans,
    }
}
