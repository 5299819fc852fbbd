//! A request on its way: what a receiver does not take is sent in halves, and what it refuses for
//! good is set aside alone.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};
use prost::Message;
use tasker_shared::trace::transport::Verdict;
use tokio_util::bytes::Bytes;

use super::{Exporter, LEAST_REQUEST_BYTES, Open};

/// Refusals one after another, without one part that was taken, after which the rest of a request is
/// no longer sent in smaller parts: nothing of it is welcome. To find one bad span takes 13.
const MOST_REFUSALS: u32 = 64;
/// Answers that blame nobody, such as 500, after which the request itself is suspected if the
/// receiver takes others: a few seconds.
const UNCLEAR: u32 = 5;

/// Whose spans, and how many of them, one after another.
pub(super) type Owners = Vec<(Arc<Open>, usize)>;

/// The bytes of a request, and whose spans are in it.
#[derive(Debug)]
pub(super) struct Parcel {
    bytes: Bytes,
    spans: usize,
    owners: Owners,
    /// Answers to it, or to what it is a part of, that blamed nobody.
    unclear: u32,
    /// How many spans the receiver had taken, of all requests, when the first of these came.
    taken_before: Option<u64>,
}

impl Parcel {
    pub(super) fn new(bytes: Bytes, owners: Owners) -> Self {
        let spans = owners.iter().map(|(_, n)| n).sum();
        Self { bytes, spans, owners, unclear: 0, taken_before: None }
    }

    pub(super) fn spans(&self) -> usize {
        self.spans
    }

    /// Notes with each of its batches that spans were refused.
    pub(super) fn refuse(&self, reason: &str) {
        for (open, n) in &self.owners {
            let mut refused = open.refused.lock().unwrap_or_else(PoisonError::into_inner);
            let before = refused.as_ref().map_or(0, |(spans, _)| *spans);
            *refused = Some((before + n, reason.to_owned()));
        }
    }

    /// The first `n` spans and the others. `None` if one of the two would be empty.
    fn split(&self, n: usize) -> Option<(Self, Self)> {
        let (first, second) = split_at(&self.bytes, n)?;
        let (mut left, mut owners) = (n, [Owners::new(), Owners::new()]);
        for (open, n) in &self.owners {
            let here = left.min(*n);
            left -= here;
            for (owners, n) in owners.iter_mut().zip([here, n - here]) {
                if n > 0 {
                    owners.push((open.clone(), n));
                }
            }
        }
        let [of_first, of_second] = owners;
        // Two more are enough for a part of what is suspected.
        let unclear = if self.unclear >= UNCLEAR { UNCLEAR - 2 } else { 0 };
        let part = |bytes, owners| Self { unclear, taken_before: self.taken_before, ..Self::new(bytes, owners) };
        Some((part(first, of_first), part(second, of_second)))
    }
}

/// Two requests out of one, each with half of its spans. `None` if it has only one.
pub fn split(request: &Bytes) -> Option<(Bytes, Bytes)> {
    let whole = ExportTraceServiceRequest::decode(request.clone()).ok()?;
    let scopes = whole.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
    split_at(request, scopes.map(|scope| scope.spans.len()).sum::<usize>() / 2)
}

/// The first `n` spans of a request, and the others. `None` if one of the two would be empty.
fn split_at(request: &Bytes, n: usize) -> Option<(Bytes, Bytes)> {
    let whole = ExportTraceServiceRequest::decode(request.clone()).ok()?;
    let mut parts = [ExportTraceServiceRequest::default(), ExportTraceServiceRequest::default()];
    let mut left = n;
    for resource in whole.resource_spans {
        for scope in resource.scope_spans {
            let mut spans = scope.spans;
            let rest = spans.split_off(left.min(spans.len()));
            left -= spans.len();
            for (part, spans) in parts.iter_mut().zip([spans, rest]) {
                if !spans.is_empty() {
                    part.resource_spans.push(ResourceSpans {
                        resource: resource.resource.clone(),
                        scope_spans: vec![ScopeSpans { scope: scope.scope.clone(), spans, ..ScopeSpans::default() }],
                        ..ResourceSpans::default()
                    });
                }
            }
        }
    }
    if parts.iter().any(|part| part.resource_spans.is_empty()) {
        return None;
    }
    let [first, second] = parts.map(|part| Bytes::from(part.encode_to_vec()));
    Some((first, second))
}

/// Sends until each span is taken, or refused for good, or until everything in the request, the
/// newest batch too, is older than `max_export_lag`. Answers `false` if the process stopped first.
pub(super) async fn deliver(exporter: &Exporter, whole: Parcel, newest: DateTime<Utc>) -> bool {
    let stats = exporter.stats();
    let (mut parts, mut refusals) = (vec![whole], 0);
    while let Some(mut part) = parts.pop() {
        let mut wait = Duration::from_millis(100);
        loop {
            let target = exporter.target();
            let error = match target.transport.send(part.bytes.clone()).await {
                Ok(accepted) => {
                    exporter.took(part.spans, &accepted);
                    refusals = 0;
                    break;
                }
                Err(error) => error,
            };
            stats.failed_requests.fetch_add(1, Ordering::Relaxed);
            let is_its_fault = match error.verdict {
                Verdict::TooLarge => {
                    let half = (part.bytes.len() / 2).max(LEAST_REQUEST_BYTES);
                    exporter.request_bytes.fetch_min(half, Ordering::Relaxed);
                    true
                }
                Verdict::BadData => true,
                Verdict::Unclear => {
                    part.unclear += 1;
                    let taken = stats.exported.load(Ordering::Relaxed);
                    let before = *part.taken_before.get_or_insert(taken);
                    part.unclear >= UNCLEAR && (taken > before || takes_one(exporter, &mut part).await)
                }
                Verdict::Later => false,
            };
            if is_its_fault {
                refusals += 1;
                match part.split(part.spans / 2).filter(|_| refusals < MOST_REFUSALS) {
                    Some((first, second)) => parts.extend([second, first]),
                    None => exporter.refused(&part, &error),
                }
                break;
            }
            exporter.is_away(&error);
            if target.max_lag.is_some_and(|lag| (Utc::now() - newest).to_std().is_ok_and(|age| age > lag)) {
                tracing::error!(%error, "spans are given up: no receiver took them within max_export_lag");
                let spans = part.spans + parts.iter().map(Parcel::spans).sum::<usize>();
                stats.abandoned.fetch_add(spans as u64, Ordering::Relaxed);
                return true;
            }
            let pause = error.retry_after.unwrap_or(wait).min(Duration::from_secs(30));
            wait = (wait * 2).min(Duration::from_secs(5));
            tokio::select! {
                () = exporter.done.cancelled() => return false,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
    true
}

/// Whether the receiver takes one span of what it does not take as a whole: if none of the requests
/// on their way gets through, each of them may hold one that it stumbles over. The first is tried
/// and the last in turn, and is left out of the part once it is taken.
async fn takes_one(exporter: &Exporter, part: &mut Parcel) -> bool {
    let is_first = part.unclear.is_multiple_of(2);
    let Some((first, second)) = part.split(if is_first { 1 } else { part.spans.saturating_sub(1) }) else {
        return false;
    };
    let (one, rest) = if is_first { (first, second) } else { (second, first) };
    let Ok(accepted) = exporter.target().transport.send(one.bytes).await else {
        return false;
    };
    exporter.took(one.spans, &accepted);
    *part = Parcel { unclear: part.unclear, ..rest };
    true
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use tasker_shared::trace::otlp::{Encoder, ServiceNames};
    use tasker_shared::trace::span::{Kind, Service, Span, TaskSpans};

    use super::*;

    /// A request of so many spans, of both services in turn.
    fn request(spans: u8) -> Bytes {
        let at = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::days(20_000);
        let span = |id: u8| Span {
            id: [id; 8],
            parent: None,
            parent_is_remote: false,
            name: "a.span",
            kind: Kind::Internal,
            service: if id.is_multiple_of(2) { Service::Worker } else { Service::Orchestration },
            start: at,
            end: at,
            attributes: vec![],
            links: vec![],
            events: vec![],
            error: None,
            settled_at: at,
        };
        let (trace_id, common) = ([7; 16], vec![]);
        let spans = (1..=spans).map(span).collect();
        let mut encoder = Encoder::new(&ServiceNames::default());
        encoder.push(&TaskSpans { trace_id, trace_flags: 1, tracestate: None, common, spans });
        encoder.finish()
    }

    /// Each span with the service of its resource.
    fn spans(request: &Bytes) -> Vec<(String, Vec<u8>)> {
        let mut found = Vec::new();
        for resource in ExportTraceServiceRequest::decode(request.clone()).unwrap().resource_spans {
            let service = format!("{:?}", resource.resource);
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            found.extend(spans.map(|span| (service.clone(), span.span_id)));
        }
        found
    }

    fn batch(n: u128) -> Arc<Open> {
        Open::new(uuid::Uuid::from_u128(n), Utc::now(), 1)
    }

    #[test]
    fn two_parts_hold_the_spans_of_the_whole_each_with_its_resource_and_its_batch() {
        let whole = request(7);
        for n in 1..7 {
            let owners = vec![(batch(1), 2), (batch(2), 4), (batch(3), 1)];
            let (first, second) = Parcel::new(whole.clone(), owners).split(n).unwrap();
            assert_eq!((first.spans(), second.spans()), (n, 7 - n));
            assert_eq!([spans(&first.bytes), spans(&second.bytes)].concat(), spans(&whole), "{n}");
            let owners = |part: &Parcel| -> Vec<u128> {
                part.owners.iter().flat_map(|(open, n)| vec![open.batch_id.as_u128(); *n]).collect()
            };
            assert_eq!([owners(&first), owners(&second)].concat(), [1, 1, 2, 2, 2, 2, 3], "{n}");
        }
        assert!(split_at(&whole, 0).is_none() && split_at(&whole, 7).is_none() && split(&request(1)).is_none());
    }
}
