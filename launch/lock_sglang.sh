#!/usr/bin/env bash
# launch/lock_sglang.sh [--check]: resolve what pyproject.toml's extra sglang asks for into requirements/sglang-gpu.txt, for a
# virtual environment of its own. With --check, resolve from the lock's own versions and fail if another lock comes out.
# Reads from the environment: UV, the resolver (default: the one in .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${UV:-.venv/bin/uv}
LOCK=requirements/sglang-gpu.txt
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

[ -x "$UV" ] || { echo "lock_sglang: $UV not found; run make setup, or set UV=" >&2; exit 1; }

# uv keeps the versions that stand in its output file.
touch "$LOCK"
grep -v '^#' "$LOCK" >"$SCRATCH/lock.txt" || true
sed -n 's/^sglang = \["\(sglang==[^"]*\)"\]$/\1/p' pyproject.toml >"$SCRATCH/asked.txt"
# glibc 2.34, because SGLang has no wheels for older ones.
"$UV" pip compile --quiet "$SCRATCH/asked.txt" --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
    --no-annotate --no-header --output-file "$SCRATCH/lock.txt" >/dev/null
{
    echo "# Every package of SGLang on NVIDIA GPUs, pinned, for a virtual environment of its own (rollout.sglang.python). Written by"
    echo "# launch/lock_sglang.sh; installed by \`make setup ENGINE=sglang DEVICE=cuda\` with --no-deps. Needs glibc 2.34."
    cat "$SCRATCH/lock.txt"
} >"$SCRATCH/new.txt"
if [ "${1:-}" = --check ]; then
    diff "$LOCK" "$SCRATCH/new.txt" >&2 || {
        echo "lock_sglang: $LOCK is not what pyproject.toml resolves to (above); run launch/lock_sglang.sh" >&2
        exit 1
    }
else
    cp "$SCRATCH/new.txt" "$LOCK"
fi
