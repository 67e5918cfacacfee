#!/usr/bin/env bash
# launch/lock_gpu.sh [--check]: resolve what pyproject.toml asks for on GPUs into requirements/gpu.txt, with the versions of
# requirements/cpu.txt where they fit. With --check, resolve from the lock's own versions and fail if another lock comes out.
# Reads from the environment: UV, the resolver (default: the one in .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${UV:-.venv/bin/uv}
LOCK=requirements/gpu.txt
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

[ -x "$UV" ] || { echo "lock_gpu: $UV not found; run make setup, or set UV=" >&2; exit 1; }

# The versions of the given locks under normalized names, the first lock's where both name a package.
versions() {
    sed 's/+cpu//; s/[[:space:]]*#.*//' "$@" | awk -F== 'NF == 2 {
        name = tolower($1); gsub(/[_.]/, "-", name); if (!seen[name]++) print name "==" $2
    }'
}

# A lock in the style of the one in the repository, on standard output. uv keeps the versions that stand in its output file.
resolve() {
    versions "$@" >"$SCRATCH/lock.txt"
    # The source distribution of transformer-engine-torch names the core for CUDA 12; built with torch for CUDA 13 it wants
    # that for 13, which is another line of the lock. Both cores install their libraries under the same names.
    echo "transformer-engine-cu12 ; sys_platform == 'never'" >"$SCRATCH/overrides.txt"
    "$UV" pip compile --quiet pyproject.toml --extra gpu --extra redis --extra data --extra math --extra loggers --extra dev \
        --override "$SCRATCH/overrides.txt" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-annotate --no-header --output-file "$SCRATCH/lock.txt" >/dev/null
    echo "# Every package of an environment for NVIDIA GPUs, tests included, pinned. Written by launch/lock_gpu.sh; installed by"
    echo "# \`make setup DEVICE=cuda\` with --no-deps."
    cat "$SCRATCH/lock.txt"
    echo "# sha256 of the lines without a #: $(sha256sum <"$SCRATCH/lock.txt" | cut -d ' ' -f 1)"
}

if [ "${1:-}" = --check ]; then
    resolve "$LOCK" >"$SCRATCH/again.txt"
    diff "$LOCK" "$SCRATCH/again.txt" >&2 || {
        echo "lock_gpu: $LOCK is not what pyproject.toml resolves to (above); run launch/lock_gpu.sh" >&2
        exit 1
    }
else
    touch "$LOCK"
    resolve requirements/cpu.txt "$LOCK" >"$SCRATCH/new.txt"
    cp "$SCRATCH/new.txt" "$LOCK"
fi
