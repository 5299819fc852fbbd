//! The messages that travel over PGMQ.
