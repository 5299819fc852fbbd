//! Span ids, derived from what a span describes.
//!
//! The same entity gives the same id in every process, in SQL and in Rust, so
//! a span exported twice is one span, and a message can name a span before it
//! exists. Never draws a random number.

use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::span::{SpanId, TraceId};

const PREFIX: &[u8] = b"tasker-span-v1";

/// What a span id names; the discriminants are the kind bytes of the hash.
///
/// A byte that was ever published is never given to another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the variants are the span names of the trace contract")]
pub enum SpanKey {
    Root = 1,
    TaskTransition = 2,
    Discovery = 3,
    Enqueuing = 4,
    Evaluation = 5,
    StepExecution = 6,
    StepTransition = 7,
    Wait = 8,
    Handler = 9,
    Submission = 10,
}

/// First 8 bytes of SHA-256(`tasker-span-v1` ‖ trace id ‖ entity ‖ generation
/// ‖ attempt ‖ kind byte ‖ ordinal), integers as 8 bytes big-endian.
///
/// `entity` is the task's or the step's uuid. `generation` counts for
/// [`SpanKey::Root`] and is 0 elsewhere; `ordinal` is the row's `version` for
/// transitions, discovery, enqueuing, evaluation and waits, and 0 elsewhere.
/// W3C forbids an all-zero id, so that one becomes 1.
pub fn span_id(trace_id: &TraceId, entity: Uuid, generation: u64, attempt: u64, key: SpanKey, ordinal: u64) -> SpanId {
    // One buffer and one update: the hash is on the path of every span.
    let mut input = [0; PREFIX.len() + 16 + 16 + 8 + 8 + 1 + 8];
    let mut at = 0;
    for part in [
        PREFIX,
        trace_id,
        entity.as_bytes(),
        &generation.to_be_bytes(),
        &attempt.to_be_bytes(),
        &[key as u8],
        &ordinal.to_be_bytes(),
    ] {
        input[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    let hash = Sha256::digest(input);
    let mut id: SpanId = [0; 8];
    id.copy_from_slice(&hash[..8]);
    if id == [0; 8] {
        id[7] = 1;
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [SpanKey; 10] = [
        SpanKey::Root,
        SpanKey::TaskTransition,
        SpanKey::Discovery,
        SpanKey::Enqueuing,
        SpanKey::Evaluation,
        SpanKey::StepExecution,
        SpanKey::StepTransition,
        SpanKey::Wait,
        SpanKey::Handler,
        SpanKey::Submission,
    ];

    #[test]
    fn every_vector_of_the_shared_file_gives_its_span_id() {
        let mut seen = 0;
        let mut kinds = std::collections::HashSet::new();
        for line in include_str!("span_id_vectors.txt").lines() {
            if line.starts_with('#') || line.is_empty() {
                continue;
            }
            let f: Vec<&str> = line.split_ascii_whitespace().collect();
            assert_eq!(f.len(), 7, "{line}");
            let trace_id = u128::from_str_radix(f[0], 16).unwrap().to_be_bytes();
            let number = |i: usize| f[i].parse::<u64>().unwrap();
            let key = ALL.into_iter().find(|k| *k as u64 == number(4)).unwrap();
            let id = span_id(&trace_id, f[1].parse().unwrap(), number(2), number(3), key, number(5));
            assert_eq!(format!("{:016x}", u64::from_be_bytes(id)), f[6], "{line}");
            kinds.insert(key);
            seen += 1;
        }
        assert!(seen >= 20, "only {seen} vectors");
        assert_eq!(kinds.len(), ALL.len(), "a kind has no vector");
    }

    #[test]
    fn each_part_of_the_key_changes_the_id() {
        let base = (Uuid::from_u128(7), 1, 2, SpanKey::Wait, 3);
        let id = |t: TraceId, (e, g, a, k, o): (Uuid, u64, u64, SpanKey, u64)| span_id(&t, e, g, a, k, o);
        let ids = [
            id([1; 16], base),
            id([2; 16], base),
            id([1; 16], (Uuid::from_u128(8), 1, 2, SpanKey::Wait, 3)),
            id([1; 16], (base.0, 9, 2, SpanKey::Wait, 3)),
            id([1; 16], (base.0, 1, 9, SpanKey::Wait, 3)),
            id([1; 16], (base.0, 1, 2, SpanKey::Root, 3)),
            id([1; 16], (base.0, 1, 2, SpanKey::Wait, 9)),
        ];
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
    }
}
