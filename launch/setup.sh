#!/usr/bin/env bash
# Makes the virtual environment of this checkout from requirements/cpu.txt. `make setup` calls it, and only when one of
# the files that it installs from has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3.11}

command -v "$PYTHON" >/dev/null || { echo "setup: $PYTHON not found; install Python 3.11 or set PYTHON=" >&2; exit 1; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt || {
    echo "setup: pip could not install requirements/cpu.txt. If it does not find torch==2.13.0+cpu, give pip PyTorch's" \
         "CPU wheel index (PIP_EXTRA_INDEX_URL; PyTorch's install page names it) and call make again." >&2
    exit 1
}
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
# Needed only by the test that scrapes Ray; requirements/ray-metrics.txt says why it is apart.
[ requirements/ray-metrics.txt -ot "$VENV/ray-metrics" ] || {
    rm -rf "$VENV/ray-metrics"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$VENV/ray-metrics" \
        -r requirements/ray-metrics.txt || {
        rm -rf "$VENV/ray-metrics"
        echo "setup: could not install requirements/ray-metrics.txt; the test that scrapes Ray needs it" >&2
    }
}

# Programs that only tests start: the server of queue.backend redis, Prometheus with promtool for alerts and dashboards,
# and a browser for the report.
MISSING=()
for program in redis-server prometheus chromium; do
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
