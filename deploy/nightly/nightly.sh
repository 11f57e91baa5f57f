#!/usr/bin/env bash
# The nightly job, for cron. Flags on the command line win over those in the file.
#
#     nightly.sh [FLAG …]
#
# Exit status: the job's (2 for an input that has to be mended, 3 for an error gate), 75 while an earlier run is not over,
# 124 for one that took longer than LIMIT.
set -euo pipefail

JOB=${JOB:-quality}
CONFIG=${CONFIG:-/etc/tracin-beam/nightly.yaml}
PYTHON=${PYTHON:-/opt/tracin-beam/bin/python}
STATE=${STATE:-/var/lib/tracin-beam}  # the lock, and a log for each day
LIMIT=${LIMIT:-20h}
KEEP_DAYS=${KEEP_DAYS:-30}

mkdir -p "$STATE/log"
exec 9>"$STATE/lock"
if ! flock --nonblock 9; then
  echo "nightly.sh: an earlier run is not over" >&2
  exit 75
fi
find "$STATE/log" -name '*.log' -mtime "+$KEEP_DAYS" -delete
log=$STATE/log/$(date -u +%F).log
echo "$(date -u +%FT%TZ) $JOB --config $CONFIG $*" >>"$log"
status=0
timeout "$LIMIT" "$PYTHON" -m tracin_beam "$JOB" --config "$CONFIG" "$@" >>"$log" 2>&1 || status=$?
echo "$(date -u +%FT%TZ) exit status $status" >>"$log"
if ((status)); then  # cron mails what is printed
  echo "nightly.sh: $JOB ended with status $status; the end of $log:" >&2
  tail -n 20 "$log" >&2
fi
exit "$status"
