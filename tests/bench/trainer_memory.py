"""What a trainer rank takes against the doctor's estimate: resident memory and torch's allocations, two sizes.

Each figure is of a process of its own. Prints one JSON line: for each size the parameters, gigabytes as estimated and
as taken, and the ratio of the two.

    .venv/bin/python -m tests.bench.trainer_memory
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from async_rl.doctor import estimate
from async_rl.models.config import read_model_config
from tests.support.trainer_memory import SIZES, allocated, estimated, make_model, resident, settings


def alone(function: Any, *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    figures = {}
    for name in ("demo", "large"):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            alone(make_model, folder, SIZES[name])
            config = settings(folder, SIZES[name])
            parameters = estimate.count_parameters(folder, read_model_config(folder)).total
            tensors = estimated(config).total
            peak, _ = alone(allocated, config)
            taken = alone(resident, config)
        process = tensors + estimate.TRAINER_BYTES
        figures[name] = {
            "parameters": parameters,
            "tensors_estimated_gb": round(tensors / 1e9, 3),
            "tensors_gb": round(peak / 1e9, 3),
            "tensors_ratio": round(tensors / peak, 3),
            "process_estimated_gb": round(process / 1e9, 3),
            "process_gb": round(taken / 1e9, 3),
            "process_ratio": round(process / taken, 3),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
