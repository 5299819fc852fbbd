#!/usr/bin/env bash
# The data in .sqlx by which checked queries compile without a database.
#
#   scripts/sqlx.sh check          fails if .sqlx is not what the queries and migrations give
#   scripts/sqlx.sh update         writes .sqlx anew
#   scripts/sqlx.sh serve COMMAND  runs a command with DATABASE_URL of a migrated, throw-away server
#
# Needs cargo and the programs of a PostgreSQL server (TASKER_PG_BIN, or on the usual paths).
# The server listens on a private unix socket only and is removed at the end. The schema comes
# from psql, not from our own migrator: that one could not be compiled before .sqlx is right.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} == @(check|update|serve) ]] || { sed -n '2,10p' "$0" >&2; exit 2; }

find_bin() {
  local dir
  for dir in "${TASKER_PG_BIN:-}" "$(pg_config --bindir 2>/dev/null || true)" \
    /usr/lib/postgresql/{18,17,16,15,14}/bin /usr/pgsql-{18,17,16,15,14}/bin \
    /usr/lib/postgresql{18,17,16,15,14}/bin /usr/libexec/postgresql{18,17,16,15,14} \
    /opt/homebrew/opt/postgresql@{18,17,16,15,14}/bin /usr/local/opt/postgresql@{18,17,16,15,14}/bin; do
    if [[ -n $dir && -x $dir/initdb && -x $dir/postgres && -x $dir/psql ]]; then
      echo "$dir"
      return
    fi
  done
  echo "no PostgreSQL server found: install it (Debian, Ubuntu: apt-get install postgresql) or set TASKER_PG_BIN" >&2
  return 1
}

bin=$(find_bin)
work=$(mktemp -d /tmp/tasker-sqlx.XXXXXX)
chmod 755 "$work"
data=$work/data
# PostgreSQL refuses to run as root.
as=()
mkdir "$data" "$work/offline"
if [[ $(id -u) == 0 ]]; then
  account=postgres
  id -u postgres >/dev/null 2>&1 || account=nobody
  chown "$account" "$data"
  if command -v runuser >/dev/null; then as=(runuser -u "$account" --); else as=(setpriv --reuid "$account" --clear-groups --); fi
fi
stop() {
  (cd / && "${as[@]}" "$bin/pg_ctl" stop -D "$data/pg" -m immediate -s) >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap stop EXIT

(
  cd /
  "${as[@]}" "$bin/initdb" -D "$data/pg" -U tasker -A trust -E UTF8 --locale=C --no-sync >"$work/log" 2>&1 &&
    "${as[@]}" "$bin/pg_ctl" start -D "$data/pg" -w -s -l "$data/server.log" \
      -o "-c listen_addresses='' -c unix_socket_directories='$data' -c fsync=off" >>"$work/log" 2>&1
) || { cat "$work/log" "$data/server.log" >&2; exit 1; }
chmod 711 "$data"
export DATABASE_URL="postgresql:///tasker?host=$data&user=tasker"
sql() { "$bin/psql" -X -q -v ON_ERROR_STOP=1 -o /dev/null "$@"; }
export PGOPTIONS='-c client_min_messages=warning'
"$bin/createdb" -h "$data" -U tasker tasker

host=$(rustc -vV | sed -n "s/^host: //p")
# Only what this machine needs is downloaded.
pgmq=$(cargo metadata --format-version 1 --locked --filter-platform "$host" | tr ',' '\n' | sed -n 's/.*"manifest_path":"\(.*\/pgmq-[0-9][^"]*\)\/Cargo.toml".*/\1/p' | head -n 1)
pgmq=$pgmq/src/install/embedded/sql/pgmq.sql
[[ -f $pgmq ]] || { echo "the pgmq crate keeps its SQL elsewhere now: $pgmq" >&2; exit 1; }
sql "$DATABASE_URL" -f "$pgmq"
for file in migrations/*.sql; do
  sql "$DATABASE_URL" -1 -f "$file"
done

if [[ $1 == serve ]]; then
  shift
  env -u PGOPTIONS -u SQLX_OFFLINE "$@"
  exit
fi

# The macros write what they learn from the database, but only when they run again.
members=$(grep -rlE 'query(_as|_scalar|_file|_file_as|_file_scalar)?!\(' --include='*.rs' */src | cut -d/ -f1 | sort -u)
packages=()
for member in $members; do
  touch -c "$member"/src/{lib,main}.rs
  packages+=(-p "$member")
done
env -u PGOPTIONS -u SQLX_OFFLINE SQLX_OFFLINE_DIR="$work/offline" cargo check --locked "${packages[@]}"
if [[ $1 == update ]]; then
  rm -rf .sqlx
  mkdir .sqlx
  cp "$work/offline"/query-*.json .sqlx/
  echo ".sqlx holds $(find .sqlx -name '*.json' | wc -l) queries"
elif ! diff -r "$work/offline" .sqlx; then
  echo ".sqlx is not current: run scripts/sqlx.sh update and commit the result" >&2
  exit 1
else
  echo ".sqlx is current"
fi
