"""Real runs as the benchmarks start them; a run that fails ends its benchmark."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def train(config: Path, runs: Path, name: str, settings: Mapping[str, object]) -> Path:
    """Run ``async-rl train`` to its end and return the run folder ``runs``/``name``."""
    command = _command(config, runs, name, settings)
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{name}: exit code {finished.returncode}\n{finished.stderr[-4000:]}")
    return runs / name


def start(config: Path, runs: Path, name: str, settings: Mapping[str, object]) -> subprocess.Popen[bytes]:
    """Start ``async-rl train`` and return its process."""
    command = _command(config, runs, name, settings)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _command(config: Path, runs: Path, name: str, settings: Mapping[str, object]) -> list[str]:
    everything = {"name": name, "runs": runs, **settings}
    arguments = [word for key, value in everything.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "async_rl.cli", "train", str(config), *arguments]
