"""Writes docs/reference/metrics.md from the declarations of all metrics, to standard output."""

from __future__ import annotations

import sys

from async_rl.metrics.declared import SECTIONS
from async_rl.metrics.spec import MetricSpec

_HEAD = """\
# Metrics

Written by `make generate` from `async_rl/metrics/declared.py`; no other metric can be emitted.

Each process of a run serves its own `/metrics`, and announces it to Prometheus by a file in
`runs/<name>/prometheus/targets/`, with labels `run`, `role` (`pipeline`, `rollout`, `trainer`) and `replica`. The
engine's (`vllm:...`, `sglang:...`) are on the page of each rollout worker. Ray's (`ray_...`, role `ray`) need an
installation of `ray[default]`. `metrics.jsonl` has the same names without the prefix `async_rl_`, one line per training
step. Each process also serves `process_resident_memory_bytes` and the like.
"""


def page() -> str:
    """Return the text of docs/reference/metrics.md."""
    return _HEAD + "".join(
        f"\n## {title}\n\n| metric | kind | unit | what it is | how to read it |\n|---|---|---|---|---|\n"
        + "".join(_line(spec) for spec in specs)
        for title, specs in SECTIONS.items()
    )


def _line(spec: MetricSpec) -> str:
    labels = ""
    if spec.labels:
        values = f"={'|'.join(spec.values)}" if spec.values else ""
        labels = "{" + ",".join(spec.labels) + values + "}"
    cells = [f"`{spec.full_name}{labels}`", spec.kind, spec.unit, spec.help, spec.how_to_read]
    # A bar within a cell would end it.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.stdout.write(page())
