#!/usr/bin/env bash
# launch/ray_job.sh CONFIG [--resume auto] [--section.key value ...]: one run as a job of a Ray cluster that is up.
#
# Submits the driver with `ray job submit`, shows its log, waits for its end and exits with its exit code. Ctrl-C or
# SIGTERM stops the job: the driver gets SIGTERM, writes a checkpoint if the run has any, and this script exits with 130.
# If this script is killed, or its connection breaks, the job continues. docs/how-to/run-as-a-ray-job.md
#
# Environment:
#   RAY_API_SERVER_ADDRESS   where the cluster takes jobs; default http://127.0.0.1:8265
#   RAY_AUTH_TOKEN           the cluster's token, or RAY_AUTH_TOKEN_PATH, a file with it; default ~/.ray/auth_token.
#                            RAY_AUTH_MODE=disabled for a cluster without
#   ASYNC_RL_DIR             the checkout on the cluster's hosts, in which the driver runs; default this one
#   VENV                     Python environment with async_rl on the cluster's hosts; default .venv of that checkout
#   JOB_ID                   the job's name on the cluster; default async-rl-DATE-NUMBER
#   STOP_S                   seconds between SIGTERM and SIGKILL for the driver; default 120: checkpoint.on_sigterm_s, and
#                            a minute for what ends after it. Ray's own default is 3
#   POLL_S                   seconds between two looks at the job once its log has ended; default 5
#   LOST_S                   seconds without an answer of the cluster after which this script gives up; default 300
#
# Needs ray[default] here and on the cluster. Written for Ray 2.60.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: launch/ray_job.sh CONFIG.yaml [--section.key value ...]" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
ASYNC_RL_DIR=${ASYNC_RL_DIR:-$here}
driver=${VENV:-$ASYNC_RL_DIR/.venv}/bin/async-rl
job=${JOB_ID:-async-rl-$(date +%Y%m%d-%H%M%S)-$$}
lost_s=${LOST_S:-300}
PATH=$PATH:$here/.venv/bin # for `ray`

# Background processes of a script ignore Ctrl-C, so the log is shown until the job has ended.
stopped=
stop() {
    [ -z "$stopped" ] || return 0
    stopped=1
    echo "ray_job: stopping $job; it has ${STOP_S:-120} s for a checkpoint" >&2
    ray job stop --no-wait "$job" >/dev/null || echo "ray_job: could not stop it; \`ray job stop $job\` tries again" >&2
}

said=$(ray job submit --no-wait --submission-id "$job" \
    --runtime-env-json "{\"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"${STOP_S:-120}\"}}" \
    -- env "--chdir=$ASYNC_RL_DIR" "$driver" train "$@" 2>&1) || {
    echo "ray_job: $RAY_API_SERVER_ADDRESS took no job: $(tail -n 1 <<<"$said")" >&2
    exit 1
}
echo "ray_job: submitted $job to $RAY_API_SERVER_ADDRESS; \`ray job logs --follow $job\` shows its log elsewhere" >&2
trap stop INT TERM

ray job logs --follow "$job" &
logs=$!
while kill -0 "$logs" 2>/dev/null; do
    wait "$logs" || true # a signal ends the wait, and not the process
done

# The log ends with the job, or because the connection broke.
answered=$SECONDS
while :; do
    if status=$(ray job status "$job" 2>&1); then
        answered=$SECONDS
        case $status in
            *"Job '$job' succeeded"*) exit 0 ;;
            *"Job '$job' was stopped"*) exit 130 ;;
            *"Job '$job' failed"*)
                [[ $status =~ "failed with exit code "([0-9]+) ]] && exit "${BASH_REMATCH[1]}"
                printf '%s\n' "$status" >&2
                exit 1
                ;;
        esac
    elif [ $((SECONDS - answered)) -ge "$lost_s" ]; then
        printf 'ray_job: no answer from %s for %s s; %s may still run: %s\n' \
            "$RAY_API_SERVER_ADDRESS" "$lost_s" "$job" "$(tail -n 1 <<<"$status")" >&2
        exit 1
    fi
    sleep "${POLL_S:-5}"
done
