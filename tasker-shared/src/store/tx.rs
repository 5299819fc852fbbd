//! The only place that begins a transaction.
