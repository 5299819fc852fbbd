#!/usr/bin/env bash
# The web page in a real browser, against a real `tasker up`.
#
#   scripts/page-tests.sh            runs the tests
#   scripts/page-tests.sh --images   and writes the pictures in docs/images anew
#
# Needs Node 20, Chromium (Debian: `apt-get install chromium`; else CHROMIUM names the program) and
# what `tasker up` needs. It fetches two packages, both for tests only: playwright-core and axe-core.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} != --images ]] || export IMAGES=1
if [[ -z ${CHROMIUM:-} ]]; then
  CHROMIUM=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
  if [[ -z $CHROMIUM && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null
    CHROMIUM=$(command -v chromium)
  fi
fi
[[ -n $CHROMIUM ]] || { echo "no Chromium found: install it, or set CHROMIUM to its path" >&2; exit 1; }
export CHROMIUM
cargo build -q -p tasker-cli
TASKER_BIN=${CARGO_TARGET_DIR:-target}/debug/tasker
export TASKER_BIN
cd tests/page
[[ -d node_modules/playwright-core && -d node_modules/axe-core ]] || npm ci --no-audit --no-fund --silent
exec node --test --test-concurrency=1 page.test.mjs
