# Stops the managed PostgreSQL a few seconds after its last user ended or died.
#
# It is a shell script, not a thread or a re-executed binary, because it must
# outlive whoever started it, by SIGKILL too, and start equally well from the
# `tasker` binary, a user's own program and a test. It takes no paths to the
# lock files: it inherits them open (flock belongs to the open file), so it
# needs no rights to open them.
#
#   fd 0 watch.lock    held by the starter's flock for as long as this runs
#   fd 1 users.lock    shared by every user
#   fd 2 control.lock  whoever starts or stops the server
#   $1 pg_ctl   $2 data directory   $3 mark of `db start`   $4 seconds to linger
#
# The kernel closes files in the order of their numbers: were this script
# killed, `watch` must be free before `control` is, or a starter could take it
# for alive.
exec 3<&0 4<&1 5<&2 </dev/null >/dev/null 2>&1
trap '' HUP INT QUIT

if command -v flock; then
  lock() { flock "$@" 3<&-; }
else # macOS has no flock(1), but perl.
  command -v perl || exit 1
  lock() {
    perl -e 'use Fcntl ":flock";
      my %how = ("-x" => LOCK_EX, "-xn" => LOCK_EX | LOCK_NB, "-u" => LOCK_UN);
      open(FILE, "<&=", $ARGV[1]) && flock(FILE, $how{$ARGV[0]}) or exit 1' -- "$@" 3<&-
  }
fi

# Runs in the background, so that the starter waits for nothing and is not the
# parent of what outlives it.
(
  while lock -x 4; do # Waits here while there are users.
    lock -u 4
    sleep "$4" 3<&- 4<&- 5<&-
    lock -x 5 || break
    if [ -e "$3" ]; then
      exec 3<&-
      exit
    fi
    if lock -xn 4; then
      # pg_ctl inherits `control`: were this script killed here, the next
      # starter would still wait for the end of the shutdown.
      "$1" stop -D "$2" -m fast -w -t 300 3<&-
      exec 3<&-
      exit
    fi
    lock -u 5
  done
) &
