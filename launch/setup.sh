#!/usr/bin/env bash
# Makes the virtual environment of this checkout from requirements/cpu.txt. Called by make; see `make setup`.
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
