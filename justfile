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
