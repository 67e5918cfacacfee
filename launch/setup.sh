#!/usr/bin/env bash
# Makes the virtual environment of this checkout from requirements/cpu.txt, or with DEVICE=cuda from gpu.txt. `make setup`
# calls it, and only when one of the files that it installs from has changed.
# Reads from the environment: VENV and PYTHON (the environment, and the Python it is made with); DEVICE (cpu or cuda);
# COMPUTE_CAPABILITY of the GPUs, such as 8.0 (default: the lowest of this host's); PROGRAMS that tests start, to be
# installed where they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3.11}
DEVICE=${DEVICE:-cpu}
# The server of queue.backend redis, Prometheus with promtool for alerts and dashboards, and a browser for the report.
PROGRAMS=${PROGRAMS-redis-server prometheus chromium}

case $DEVICE in
    cpu) LOCK=requirements/cpu.txt ;;
    cuda) LOCK=requirements/gpu.txt ;;
    *) echo "setup: DEVICE is '$DEVICE'; set cpu or cuda" >&2; exit 1 ;;
esac
made_for=$(cat "$VENV/device" 2>/dev/null || { [ ! -e "$VENV/.installed" ] || echo cpu; })  # .installed: of release 0.1
if [ -n "$made_for" ] && [ "$made_for" != "$DEVICE" ]; then
    echo "setup: $VENV is an environment for $made_for, not for $DEVICE; remove it (make clean), or set VENV=" >&2
    exit 1
fi

command -v "$PYTHON" >/dev/null || { echo "setup: $PYTHON not found; install Python 3.11 or set PYTHON=" >&2; exit 1; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

packages() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }

if [ "$DEVICE" = cpu ]; then
    packages -r "$LOCK" || {
        echo "setup: pip could not install $LOCK. If it does not find torch==2.13.0+cpu, give pip PyTorch's CPU wheel" \
             "index (PIP_EXTRA_INDEX_URL; PyTorch's install page names it) and call make again." >&2
        exit 1
    }
else
    written=$(sed -n 's/^# sha256 of the lines without a #: //p' "$LOCK")
    [ "$written" = "$(grep -v '^#' "$LOCK" | sha256sum | cut -d ' ' -f 1)" ] || {
        echo "setup: $LOCK was edited by hand; change pyproject.toml and run launch/lock_gpu.sh" >&2
        exit 1
    }
    # Compiled against the torch that is installed here, so after it and without an environment of its own.
    compiled=$(grep '^transformer-engine-torch==' "$LOCK")
    packages -r <(grep -v '^transformer-engine-torch==' "$LOCK") || {
        echo "setup: pip could not install $LOCK" >&2
        exit 1
    }
    packages --no-build-isolation "$compiled" || {
        echo "setup: could not compile $compiled. It needs the toolkit of CUDA 13 (nvcc; set CUDA_HOME), its cuDNN" \
             "headers and g++." >&2
        exit 1
    }
    # cuDNN's attention takes packed sequences from Hopper (9.0) on; before, flash-attn does.
    lowest() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -V | head -n 1; }
    COMPUTE_CAPABILITY=${COMPUTE_CAPABILITY:-$(lowest)} || {
        echo "setup: nvidia-smi finds no GPU; set COMPUTE_CAPABILITY, such as 9.0" >&2
        exit 1
    }
    if [ "${COMPUTE_CAPABILITY%%.*}" -lt 9 ]; then
        packages --no-build-isolation -r requirements/gpu-sm80.txt || {
            echo "setup: could not install requirements/gpu-sm80.txt, which GPUs of compute capability" \
                 "$COMPUTE_CAPABILITY need" >&2
            exit 1
        }
    fi
fi
packages --no-build-isolation --editable .
echo "$DEVICE" >"$VENV/device"
# Needed only by the test that scrapes Ray; requirements/ray-metrics.txt says why it is apart.
[ requirements/ray-metrics.txt -ot "$VENV/ray-metrics" ] || {
    rm -rf "$VENV/ray-metrics"
    packages --target "$VENV/ray-metrics" -r requirements/ray-metrics.txt || {
        rm -rf "$VENV/ray-metrics"
        echo "setup: could not install requirements/ray-metrics.txt; the test that scrapes Ray needs it" >&2
    }
}

MISSING=()
for program in $PROGRAMS; do
    command -v "$program" >/dev/null || MISSING+=("$program")
done
if [ ${#MISSING[@]} -gt 0 ]; then
    SUDO=$([ "$(id -u)" = 0 ] || echo sudo -n)
    install() {
        DEBIAN_FRONTEND=noninteractive $SUDO apt-get install -qq -y --no-install-recommends "${MISSING[@]}" >/dev/null 2>&1
    }
    install || { $SUDO apt-get update -qq >/dev/null 2>&1 && install; } ||
        echo "setup: could not install ${MISSING[*]}; some tests need it" >&2
fi
