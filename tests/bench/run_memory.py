"""The memory of a whole run on CPU against what the doctor says beforehand, for two sizes of model.

Takes all processes of a run together: driver, queue, Ray's own, the trainer's rank, the engine and its front end.
Prints one JSON line: for each size the gigabytes estimated, those taken at the peak, the ratio of the two, and both by
their parts.

    .venv/bin/python -m tests.bench.run_memory
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support import run_memory


def compared(recipe: Path) -> dict[str, Any]:
    """Run a recipe and return the figures."""
    found = run_memory.taken(recipe)
    expected = run_memory.estimated(recipe)
    return {
        "estimated_gb": _gb(expected.total),
        "taken_gb": _gb(found.peak),
        "ratio": round(expected.total / found.peak, 3),
        "estimated_by_part_gb": {part: _gb(amount) for part, amount in asdict(expected).items()},
        "taken_by_process_gb": {name[:40]: _gb(amount) for name, amount in found.by_process.most_common()},
        "samples": found.samples,
    }


def _gb(amount: int) -> float:
    return round(amount / 1e9, 3)


def main() -> None:
    figures = {}
    for name, make in (("demo", run_memory.demo), ("large", run_memory.large)):
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = compared(make(Path(folder)))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
