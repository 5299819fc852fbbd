//! W3C trace context and baggage.
