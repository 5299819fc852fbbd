//! Logs and live spans of this process.
