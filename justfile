# `just check` is what CI runs.

check: fmt clippy test demo

fmt:
    cargo fmt --all --check

clippy:
    cargo clippy --workspace --all-targets -- -D warnings

test:
    cargo test --workspace

demo:
    cargo run -p tasker-cli -- demo

# Needs cargo-deny; reads deny.toml.
deny:
    cargo deny check

# Needs python3; see the script.
fuzz-api *ARGS:
    scripts/fuzz-api.sh {{ARGS}}

# The trace at full size: kills, an outage of the collector, a clean count, ten thousand steps, and
# Jaeger's query API where JAEGER_QUERY_URL and JAEGER_OTLP_URL name one. Takes minutes.
trace-proof:
    cargo test --release -p tasker-tests --test promises -- --ignored --nocapture --test-threads 1 trace_proof
