#!/bin/sh
# An SDK worker process of a task manager: Beam's boot program, which starts Python's SDK in the environment
# that PATH gives. Each has a folder of its own for what is staged, as several may run on one machine.
set -e
mkdir -p "$WORKER_FOLDER/$$"
cd "$WORKER_FOLDER/$$"
exec "$WORKER_BOOT" --semi_persist_dir="$WORKER_FOLDER/$$" "$@"
