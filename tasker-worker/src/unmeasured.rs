//! `measure.rs` of a worker without the feature `metrics`: nothing is counted.

use std::sync::Arc;
use std::time::Duration;

use tasker_shared::trace::context::Traceparent;

use crate::protocol::Outcome;

pub(crate) struct Numbers;

impl Numbers {
    pub(crate) fn new(_: Arc<str>, _: usize) -> Self {
        Self
    }

    #[expect(clippy::unused_self, reason = "as with the feature")]
    pub(crate) fn claimed(&self, _: usize) {}

    #[expect(clippy::unused_self, reason = "as with the feature")]
    pub(crate) fn busy(&self) -> impl Drop + use<> {
        struct Nothing;
        impl Drop for Nothing {
            fn drop(&mut self) {}
        }
        Nothing
    }

    #[expect(clippy::unused_self, reason = "as with the feature")]
    pub(crate) fn ran(&self, _: &str, _: Option<&Outcome>, _: Duration, _: Option<&Traceparent>) {}
}

pub(crate) fn answered(_: &[bool]) {}

pub(crate) fn call_failed(_: &'static str) {}

pub(crate) fn waits() {}

pub(crate) fn waited(_: usize) {}

pub(crate) fn span_failed(_: &Arc<str>, _: Arc<str>, _: &str) {}
