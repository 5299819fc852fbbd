#!/usr/bin/env bash
# Everything a change has to pass: the list of `just check` and of continuous integration.
#
#   scripts/check.sh             all steps, in this order
#   scripts/check.sh STEP...     these
#
#   fmt      the layout of the code
#   measure  lines, walks, circles and packages are within their limits (tools/measure)
#   deny     licences, bans and sources of dependencies (deny.toml; needs cargo-deny)
#   sqlx     the data of checked queries is that of the queries and the migrations
#   clippy   lints
#   features a worker's crate compiles without its features, and with each alone
#   doc      the documentation of the crates builds
#   package  each crate that is published can be packed
#   test     all tests
#   pooler   the same database through a real PgBouncer (needs pgbouncer)
#   demo     the demo of the README
#   page     the web page in a real browser (needs Node and Chromium)
set -euo pipefail
cd "$(dirname "$0")/.."

# Nothing of the caller's surroundings decides what is checked.
unset DATABASE_URL TASKER_STORM ${!OTEL_@} ${!TRACING_@}
# Queries compile from the data in .sqlx, which the step `sqlx` compares with a real server.
export SQLX_OFFLINE=true

run() {
  case $1 in
    fmt) cargo fmt --all --check ;;
    measure) cargo run --quiet --locked -p tasker-measure -- --check ;;
    deny) cargo deny --locked --log-level error check bans licenses sources ;;
    sqlx) scripts/sqlx.sh check ;;
    clippy) cargo clippy --workspace --all-targets --locked -- -D warnings ;;
    features) cargo check --locked -p tasker-worker && cargo check --locked -p tasker-worker --features metrics && cargo check --locked -p tasker-worker --features otlp ;;
    doc) RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace --locked ;;
    package)
      # Tests and tools are not published. Without the lock file it needs no network.
      cargo package --workspace --no-verify --allow-dirty --locked --exclude-lockfile \
        --exclude tasker-tests --exclude tasker-bench --exclude tasker-benches --exclude tasker-measure
      ;;
    test) cargo test --workspace --locked ;;
    pooler) cargo test --workspace --locked --test cli -- --ignored pooler ;;
    demo) cargo run --locked -p tasker-cli -- demo ;;
    page) scripts/page-tests.sh ;;
  esac
}

all=(fmt measure deny sqlx clippy features doc package test pooler demo page)
steps=("$@")
[[ $# -gt 0 ]] || steps=("${all[@]}")
for step in "${steps[@]}"; do
  [[ " ${all[*]} " == *" $step "* ]] || { sed -n '2,18p' "$0" >&2; exit 2; }
done
for step in "${steps[@]}"; do
  printf '\n=== %s (at %dm%02ds)\n' "$step" $((SECONDS / 60)) $((SECONDS % 60))
  run "$step"
done
