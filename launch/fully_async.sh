#!/usr/bin/env bash
# launch/fully_async.sh CONFIG [--section.key value ...]: one fully-asynchronous run. Settings live in CONFIG.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { echo "usage: launch/fully_async.sh CONFIG.yaml [--section.key value ...]" >&2; exit 2; }
make --silent --directory "$here" setup >&2
exec "$here/.venv/bin/async-rl" train "$@"
