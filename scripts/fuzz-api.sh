#!/usr/bin/env bash
# Sends the HTTP API what its own OpenAPI document allows and what it does not, for every route:
# no answer of 500 or above, and none that the document does not describe.
#
#   scripts/fuzz-api.sh [EXAMPLES]   how many requests of each kind a route gets, 50 if not said
#
# Needs cargo, python3 with venv, and the programs of a PostgreSQL server. Schemathesis comes from
# PyPI, into target/. Everything it starts is private and removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
examples=${1:-50}
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
venv=$target/schemathesis
[[ -x $venv/bin/schemathesis ]] || { python3 -m venv "$venv" && "$venv/bin/pip" install -q schemathesis==4.32.5; }
cargo build -q -p tasker-cli
tasker=$target/debug/tasker
export TASKER_HOME
TASKER_HOME=$(mktemp -d /tmp/tasker-fuzz.XXXXXX)
chmod 755 "$TASKER_HOME"
up=
stop() {
  [[ -z $up ]] || { kill "$up" 2>/dev/null; wait "$up" 2>/dev/null; } || true
  "$tasker" db stop >/dev/null 2>&1 || true
  rm -rf "$TASKER_HOME"
}
trap stop EXIT
unset DATABASE_URL
"$tasker" db start >/dev/null
"$tasker" template apply examples/order_fulfillment/order.yaml examples/features/*.yaml >/dev/null
key=$("$tasker" key create fuzz --role admin 2>/dev/null)
# An idle port, asked of the kernel.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$tasker" up --listen "127.0.0.1:$port" --rate 100000 >"$TASKER_HOME/up.log" 2>&1 &
up=$!
"$tasker" task submit examples/approval --input '{}' >/dev/null
task=$("$tasker" task list -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["task_uuid"])')

# The stream of live changes does not end; a test of its own looks at it. A well-formed request may
# name what is not there, so that it is refused is no mistake.
fuzz() {
  # It keeps a cache where it stands.
  (cd "$TASKER_HOME" && "$venv/bin/schemathesis" --config-file "$1" run "http://127.0.0.1:$port/openapi.json" --wait-for-schema 30 \
    --header "Authorization: Bearer $key" --exclude-path /v1/events \
    --checks all --exclude-checks positive_data_acceptance --max-examples "$examples" \
    --generation-database none --no-color --suppress-health-check all --warnings off)
}
# First about whatever comes to its mind, then about what is there: a task that waits for a signal.
: >"$TASKER_HOME/anything.toml"
cat >"$TASKER_HOME/something.toml" <<TOML
[parameters]
"path.task" = "$task"
"path.step" = "approval"
"path.namespace" = "examples"
"path.name" = "approval"
"path.queue" = "worker_examples"
TOML
fuzz "$TASKER_HOME/anything.toml"
fuzz "$TASKER_HOME/something.toml"
kill -0 "$up" || { tail -20 "$TASKER_HOME/up.log"; echo "the server ended meanwhile"; exit 1; }
! grep -E "panicked| ERROR " "$TASKER_HOME/up.log"
