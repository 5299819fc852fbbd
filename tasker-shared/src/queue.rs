//! PGMQ: read, send, delete, quarantine.
