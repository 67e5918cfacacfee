"""Writes docs/reference/metrics.md from the declarations of all metrics, to standard output."""

from __future__ import annotations

import sys

from async_rl.metrics.declared import SECTIONS, MetricSpec

_HEAD = """\
# Metrics

Written by `make generate` from `async_rl/metrics/declared.py`; what is not there cannot be emitted.

Each process of a run serves its own `/metrics`, and announces it to Prometheus by a file in
`runs/<name>/prometheus/targets/`, with labels `run`, `role` (`pipeline`, `rollout`, `trainer`) and `replica`. vLLM's
metrics (`vllm:...`) are on the same pages as a worker's; Ray's (`ray_...`, role `ray`) are there where Ray is
installed as `ray[default]`. `metrics.jsonl` has the same names without the prefix `async_rl_`, one line per training
step. `process_resident_memory_bytes` and its like are there for each process.
"""


def page() -> str:
    """The whole file."""
    return _HEAD + "".join(
        f"\n## {title}\n\n| metric | kind | unit | what it is | why one looks at it |\n|---|---|---|---|---|\n"
        + "".join(_line(spec) for spec in specs)
        for title, specs in SECTIONS.items()
    )


def _line(spec: MetricSpec) -> str:
    labels = ""
    if spec.labels:
        values = f"={'|'.join(spec.values)}" if spec.values else ""
        labels = "{" + ",".join(spec.labels) + values + "}"
    cells = [f"`{spec.full_name}{labels}`", spec.kind, spec.unit, spec.help, spec.why]
    # A bar within a cell would end it.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.stdout.write(page())
