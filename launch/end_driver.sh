#!/usr/bin/env bash
# launch/end_driver.sh: sends SIGTERM to the driver (`async-rl train`) on this host, and returns once it has ended.
#
# For what ends a host without asking the driver, like Kubernetes' preStop hook: the run ends after a checkpoint
# (checkpoint.on_sigterm_s). For a container: on a machine it would end every run of this user. It needs no ps, which a
# slim image has not.
#
# Environment:
#   PROC   where the processes are listed; default /proc
set -euo pipefail
PROC=${PROC:-/proc}

# Prints the process ids of the driver and of its supervisor, which are python ... async-rl train ...
drivers() {
    local process words
    for process in "$PROC"/[0-9]*; do
        mapfile -d '' -t words 2>/dev/null <"$process/cmdline" || continue
        [ ${#words[@]} -ge 3 ] || continue
        case "${words[0]##*/} ${words[1]##*/} ${words[2]}" in
            python*" async-rl train") echo "${process##*/}" ;;
        esac
    done
}

for process in $(drivers); do
    kill -TERM "$process" 2>/dev/null || true
done
while [ -n "$(drivers)" ]; do
    sleep 0.5
done
