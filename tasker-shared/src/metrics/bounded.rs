//! A family of metrics that cannot grow without end.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// Label sets of one metric; what comes later is counted as `other`.
const MOST: usize = 1000;

/// The labels of a metric.
pub trait Labels: Clone + Eq + Hash + EncodeLabelSet {
    /// Where it is counted when there are too many: the same words, every name `other`.
    #[must_use]
    fn other(&self) -> Self;
}

/// A metric for each of its label sets, up to a thousand.
#[derive(Debug)]
pub struct Bounded<L, M> {
    known: Arc<RwLock<HashMap<L, M>>>,
    new: fn() -> M,
}

impl<L, M> Clone for Bounded<L, M> {
    fn clone(&self) -> Self {
        Self { known: Arc::clone(&self.known), new: self.new }
    }
}

impl<L: Labels, M: Clone> Bounded<L, M> {
    pub(super) fn new(new: fn() -> M) -> Self {
        Self { known: Arc::default(), new }
    }

    /// The metric with these labels. Keep it where it is used often.
    pub fn of(&self, labels: &L) -> M {
        if let Some(metric) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(labels) {
            return metric.clone();
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let labels = if known.len() < MOST || known.contains_key(labels) { labels.clone() } else { labels.other() };
        known.entry(labels).or_insert_with(self.new).clone()
    }
}

impl<L: Labels, M: EncodeMetric + TypedMetric> EncodeMetric for Bounded<L, M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        for (labels, metric) in &*self.known.read().unwrap_or_else(PoisonError::into_inner) {
            metric.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }
}
