"""The first hour with a GPU in twelve minutes: every path that only CPUs have run, one after the other.

    .venv/bin/python -m tests.gpu.first_light [--device cuda|cpu] [--only STEP ...]

A line per step as it ends, then one JSON line: for each step its seconds and figures, why it failed, or what it would
have needed. Exits with 1 if a step failed. Runs with whatever is installed, the trainer's steps without vLLM and
without Transformer Engine too; and on a CPU, as far as that goes. ``steps`` has the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu import steps
from tests.gpu.conftest import count_gpus

ROOT = Path(__file__).resolve().parents[2]
# On one card; a step that hangs takes its own limit only.
LIMIT_S, STEP_LIMIT_S = 720.0, 240.0
STATUSES = ("passed", "failed", "skipped")
SKIPPED = 77  # the exit status that automake has for it


def attempt(step: str, device: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """Run one step in a process of its own; return its record."""
    command = [sys.executable, "-m", "tests.gpu.first_light", "--step", step, "--device", device, "--folder", folder]
    folder.mkdir(parents=True)
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return {"status": "failed", "seconds": round(limit_s, 1), "why": f"did not end within {limit_s:.0f} s"}
    record: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    lines = output.splitlines()
    if process.returncode == 0:
        return {"status": "passed", **record, "figures": json.loads(lines[-1])}
    if process.returncode == SKIPPED:
        return {"status": "skipped", **record, "why": lines[-1]}
    return {"status": "failed", **record, "why": errors[-2000:]}


def one_step(name: str, device: str, folder: Path) -> int:
    (function,) = (step for step in (*steps.STEPS, *steps.PARTS) if step.__name__ == name)
    try:
        figures = function(device, folder)
    except steps.Skipped as reason:
        print(reason)
        return SKIPPED
    print(json.dumps(figures))
    return 0


def main() -> int:
    names = [step.__name__ for step in steps.STEPS]
    parser = argparse.ArgumentParser(description="Run each path of a GPU once.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if count_gpus() else "cpu")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        return one_step(arguments.step, arguments.device, arguments.folder)
    found: dict[str, Any] = {}
    deadline = time.monotonic() + LIMIT_S
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in arguments.only:
            left = deadline - time.monotonic()
            if left < 10:
                found[name] = {"status": "skipped", "seconds": 0.0, "why": f"no time left of {LIMIT_S:.0f} s"}
            else:
                found[name] = attempt(name, arguments.device, Path(folder) / name, min(left, STEP_LIMIT_S))
            record = found[name]
            what = record.get("why") or json.dumps(record["figures"])
            print(f"{record['status']:<8} {name:<12} {record['seconds']:6.1f} s  {what[-400:]}", flush=True)
    count = {status: sum(record["status"] == status for record in found.values()) for status in STATUSES}
    print(json.dumps({"device": arguments.device, **count, "steps": found}))
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
