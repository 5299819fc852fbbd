# What CI runs (`.ci/run`), but for the page in a browser (`just page`).

check: fmt sqlx clippy doc test demo

fmt:
    cargo fmt --all --check

# Whether the data of the checked queries is that of the queries and the migrations.
sqlx:
    scripts/sqlx.sh check

clippy:
    cargo clippy --workspace --all-targets -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace

test:
    cargo test --workspace

demo:
    cargo run -p tasker-cli -- demo

# Needs Node and Chromium; see the script.
page *ARGS:
    scripts/page-tests.sh {{ARGS}}

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

# What a flood of one namespace, at its limit on open tasks, costs another. Takes a minute.
flood-proof:
    cargo test --release -p tasker-tests --test promises -- --ignored --nocapture a_flood_at_its_limit
