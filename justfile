# Everything a change has to pass, as continuous integration runs it; or some steps of it: `just check fmt clippy`.
check *STEPS:
    scripts/check.sh {{STEPS}}

fmt:
    cargo fmt --all

clippy:
    scripts/check.sh clippy

test:
    scripts/check.sh test

demo:
    scripts/check.sh demo

# Lines of code, walks, circles and packages; with `--check` it fails on what is over its limit in tools/measure.
measure *ARGS:
    cargo run --quiet --locked -p tasker-measure -- {{ARGS}}

# After a change of a query or a migration: the data by which queries compile without a database.
sqlx-update:
    scripts/sqlx.sh update

# The web page in a browser. Needs Node and Chromium; see the script.
page *ARGS:
    scripts/page-tests.sh {{ARGS}}

# What `just check` asks of dependencies, and their advisories, which a network has.
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

# Throughput, latency and cost, beside this machine's limits; see docs/explanations/performance.md.
bench *ARGS:
    cargo run --release -p tasker-bench -- {{ARGS}}

# What the pure parts cost.
benches *ARGS:
    cargo bench -p tasker-benches {{ARGS}}

# Load at full size while processes and the database are killed. Takes minutes.
storm:
    TASKER_STORM=1 cargo test --release -p tasker-tests --test promises -- every_feature_under_kills orchestrator_killed_under_load two_orchestrators database_killed export_recovery

# The documents as a site in target/site. Needs mdBook 0.5: cargo install mdbook --locked
site:
    mdbook build
