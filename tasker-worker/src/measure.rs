//! The metrics that a worker counts in its process.

use std::sync::Arc;
use std::time::Duration;

use tasker_shared::metrics::{AttemptEnd, Exemplar, OfCall, OfHandler, OfNamespace, OfResult, SpanEnd, metrics};
use tasker_shared::trace::context::Traceparent;

use crate::protocol::Outcome;

/// The numbers of one worker; its slots count for as long as this lives.
pub(crate) struct Numbers {
    namespace: Arc<str>,
    slots: i64,
}

impl Numbers {
    pub(crate) fn new(namespace: Arc<str>, slots: usize) -> Self {
        let numbers = Self { namespace, slots: i64::try_from(slots).unwrap_or(i64::MAX) };
        metrics().worker_slots.of(&numbers.of_namespace()).inc_by(numbers.slots);
        numbers
    }

    fn of_namespace(&self) -> OfNamespace {
        OfNamespace { namespace: Arc::clone(&self.namespace) }
    }

    pub(crate) fn claimed(&self, attempts: usize) {
        let attempts = u64::try_from(attempts).unwrap_or(u64::MAX);
        metrics().worker_claims.of(&self.of_namespace()).inc_by(attempts);
    }

    /// A slot is in use until the answer is dropped.
    pub(crate) fn busy(&self) -> impl Drop + use<> {
        struct Busy(OfNamespace);
        impl Drop for Busy {
            fn drop(&mut self) {
                metrics().worker_slots_busy.of(&self.0).dec();
            }
        }
        let busy = Busy(self.of_namespace());
        metrics().worker_slots_busy.of(&busy.0).inc();
        busy
    }

    /// A handler has ended; `None`: nobody wanted its result any more.
    pub(crate) fn ran(&self, handler: &str, outcome: Option<&Outcome>, took: Duration, parent: Option<&Traceparent>) {
        let outcome = match outcome {
            None => "dropped",
            Some(Outcome::Success { .. }) => "success",
            Some(Outcome::Error { error }) => match &*error.kind {
                "panic" => "panic",
                "timeout" => "timeout",
                _ if error.retryable => "error",
                _ => "failure",
            },
        };
        let (namespace, handler): (Arc<str>, Arc<str>) = (Arc::clone(&self.namespace), handler.into());
        let exemplar = parent.and_then(|parent| Exemplar::of(parent.trace_id, parent.flags));
        let of_handler = OfHandler { namespace: Arc::clone(&namespace), handler: Arc::clone(&handler) };
        metrics().worker_handler_duration.of(&of_handler).observe(took.as_secs_f64(), exemplar, None);
        metrics().worker_attempts.of(&AttemptEnd { namespace, handler, outcome }).inc();
    }
}

impl Drop for Numbers {
    fn drop(&mut self) {
        metrics().worker_slots.of(&self.of_namespace()).dec_by(self.slots);
    }
}

/// Results were answered for.
pub(crate) fn answered(accepted: &[bool]) {
    let good = accepted.iter().filter(|accepted| **accepted).count();
    for (result, count) in [("accepted", good), ("stale", accepted.len() - good)] {
        if count > 0 {
            metrics().worker_reports.of(&OfResult { result }).inc_by(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
}

/// A call of the database failed: claim, heartbeat or report.
pub(crate) fn call_failed(call: &'static str) {
    metrics().worker_call_failures.of(&OfCall { call }).inc();
}

/// A result waits for the database.
pub(crate) fn waits() {
    metrics().worker_results_waiting.inc();
}

/// So many results wait no longer.
pub(crate) fn waited(results: usize) {
    metrics().worker_results_waiting.dec_by(i64::try_from(results).unwrap_or(0));
}

/// A span of a handler ended in an error.
pub(crate) fn span_failed(name: &Arc<str>, namespace: Arc<str>, handler: &str) {
    let of = SpanEnd { span_name: Arc::clone(name), namespace, handler: handler.into() };
    metrics().span_errors.of(&of).inc();
}
