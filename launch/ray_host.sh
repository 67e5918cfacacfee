#!/usr/bin/env bash
# One host of a Ray cluster. slurm.sbatch and skypilot.yaml call it; by hand it makes a cluster of any machines.
#
#   launch/ray_host.sh head              start the cluster on this host; runs until it is ended
#   launch/ray_host.sh worker HEAD       add this host to the cluster at HEAD, address:port; runs until it is ended
#   launch/ray_host.sh address           print the HEAD of a cluster that is started on this host
#   launch/ray_host.sh wait HEAD HOSTS   return once so many hosts are in the cluster; call it on one of them
#
# Environment, the same on every host but for HOST_*:
#   VENV             Python environment with async_rl; default the checkout's .venv, or what PATH has
#   RAY_AUTH_TOKEN   the cluster's secret: who has it may run code on every host. Or RAY_AUTH_TOKEN_PATH, a file with
#                    it; default ~/.ray/auth_token. `openssl rand -hex 32` makes one
#   RAY_HEAD_PORT    port of HEAD; default 6379
#   RAY_TMPDIR       where Ray keeps logs and sockets, a short path on a local disk; default /tmp
#   HOST_INTERFACE   network interface towards the other hosts, for example ib0; default: the head takes its first global
#                    address, IPv4 before IPv6, and the others the one with the route to the head
#   HOST_ADDRESS     this host's address, instead of one of an interface
#   HOST_CPUS        cores that Ray may use on this host; default what Slurm gave, else all
#   JOIN_S           seconds until a host that cannot join, or a wait, fails; default 300
#   REJOIN_AFTER_S   seconds after which a host whose Ray ends joins once more, if the head still answers; default 60
#   RAY_JOBS         1 for a head that takes `ray job submit` at 127.0.0.1:8265; needs ray[default] on every host
#   RAY_START_ARGS   more options for `ray start`, separated by spaces
#
# Written for Ray 2.60.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$here/.venv}
RAY_HEAD_PORT=${RAY_HEAD_PORT:-6379}
JOIN_S=${JOIN_S:-300}
REJOIN_AFTER_S=${REJOIN_AFTER_S:-60}
PATH=$VENV/bin:$PATH

fail() {
    echo "ray_host: $*" >&2
    exit 1
}

# What a run gives to a cluster of its own, and cannot give to one that it joins (cluster.py and before_ray.py
# of async_rl/driver say why).
export RAY_USAGE_STATS_ENABLED=0
export RAY_task_events_max_num_task_in_gcs=5000
export RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs=1000
export RAY_JEMALLOC_PROFILE=raylet,gcs_server
export RAY_JEMALLOC_CONF=narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0
export RAY_grpc_keepalive_timeout_ms=120000

# Prints this host's address for the others.
own_address() {
    if [ -n "${HOST_ADDRESS:-}" ]; then
        echo "$HOST_ADDRESS"
        return
    fi
    local candidates candidate ipv6=
    if [ -n "${HOST_INTERFACE:-}" ]; then
        candidates=$(ip -o addr show dev "$HOST_INTERFACE" scope global | awk '{sub("/.*", "", $4); print $4}') ||
            fail "HOST_INTERFACE: $(hostname) has no interface $HOST_INTERFACE; \`ip addr\` lists them"
    else
        candidates=$(hostname -I)
    fi
    for candidate in $candidates; do
        case $candidate in
            127.* | 169.254.* | ::1 | fe80:*) ;;
            172.17.0.1) ;; # Docker's bridge, which has this address on every host
            *:*) ipv6=${ipv6:-$candidate} ;;
            *)
                echo "$candidate"
                return
                ;;
        esac
    done
    [ -n "$ipv6" ] || fail "$(hostname) has no address on ${HOST_INTERFACE:-any interface}; set HOST_ADDRESS"
    echo "$ipv6"
}

# Prints address:port, with brackets around IPv6.
head_address() {
    local address
    address=$(own_address)
    case $address in
        *:*) echo "[$address]:$RAY_HEAD_PORT" ;;
        *) echo "$address:$RAY_HEAD_PORT" ;;
    esac
}

need_token() {
    export RAY_AUTH_MODE=token
    [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ] ||
        fail "no token for the cluster; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
}

# Replaces this process with `ray start`, given the options of its kind.
start() {
    local options=(--block --disable-usage-stats) more cpus=${HOST_CPUS:-${SLURM_CPUS_ON_NODE:-}}
    [ -z "$cpus" ] || options+=("--num-cpus=$cpus")
    read -r -a more <<<"${RAY_START_ARGS:-}"
    exec ray start "$@" "${options[@]}" "${more[@]}"
}

# Adds this host to the cluster at $1, with more options, until Ray ends here. Ray takes a host for dead whose network is
# broken for a minute, and its processes there end when they reach the head again: then the host joins once more. Not
# one whose Ray ends sooner, which would end again.
stay_joined() {
    local head=$1 child code began stopped=
    shift
    while :; do
        began=$SECONDS
        (start "--address=$head" "$@") &
        child=$!
        trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
        while :; do
            code=0
            wait "$child" || code=$?
            kill -0 "$child" 2>/dev/null || break # else a signal to this script has ended the wait
        done
        if [ -n "$stopped" ] || [ "$code" -eq 0 ] || [ $((SECONDS - began)) -lt "$REJOIN_AFTER_S" ] ||
            ! ray health-check --address "$head" >/dev/null 2>&1; then
            exit "$code"
        fi
        echo "ray_host: $(hostname): Ray has ended (exit code $code); joining the cluster at $head once more" >&2
    done
}

await_head() {
    local said deadline=$((SECONDS + JOIN_S))
    until said=$(ray health-check --address "$1" 2>&1); do
        [ "$SECONDS" -lt "$deadline" ] ||
            fail "$(hostname): no cluster answers at $1 within $JOIN_S s: $(tail -n 1 <<<"$said")"
        sleep 0.2
    done
}

await_hosts() {
    exec python - "$1" "$2" "$JOIN_S" <<'END'
import sys
import time

import ray

head, wanted, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline = time.monotonic() + seconds
while not ray.is_initialized():
    try:
        ray.init(address=head, log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray's control process answers before its process on this host does
        if time.monotonic() > deadline:
            sys.exit(f"ray_host: the cluster at {head} cannot be joined: {error}")
        time.sleep(1)
while len(there := sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"ray_host: {len(there)} of {wanted} hosts joined within {seconds:g} s: {', '.join(there)}")
    time.sleep(0.2)
END
}

case ${1:-}:$# in
    address:1) head_address ;;
    head:1)
        need_token
        address=$(own_address)
        jobs=false
        [ "${RAY_JOBS:-0}" = 0 ] || jobs=true
        start --head "--node-ip-address=$address" "--port=$RAY_HEAD_PORT" "--include-dashboard=$jobs"
        ;;
    worker:2)
        need_token
        await_head "$2"
        if [ -n "${HOST_ADDRESS:-}${HOST_INTERFACE:-}" ]; then
            address=$(own_address)
            stay_joined "$2" "--node-ip-address=$address"
        fi
        stay_joined "$2"
        ;;
    wait:3)
        need_token
        await_head "$2"
        await_hosts "$2" "$3"
        ;;
    *)
        echo "usage: launch/ray_host.sh head | worker HEAD | address | wait HEAD HOSTS" >&2
        exit 2
        ;;
esac
