"""The memory that log-probs and their gradient take beside the logits, at the sizes of real vocabularies.

    .venv/bin/python -m tests.bench.memory [--rounds 1]

Each size and type is measured in a process of its own: by how much its resident memory grows, at most, while the
log-probs and entropies of T tokens are computed from logits [T, V] that exist already, and then the gradient. That is
VmHWM of /proc, so it has what torch allocates within an operation too. It is divided by T x V x itemsize, the bytes of
the logits. The floor is 1.0, because the gradient of the logits must exist, in their type, beside them.

Prints a line per size, then one JSON line: ``peak_over_logits`` (the largest of all), the same by size, and
``gb_per_s`` (bytes of logits per second of processor time for both passes, the median, on one thread).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.bench.trainer import resident_bytes

# T tokens of a microbatch by V tokens of a vocabulary: those of Llama 2, DeepSeek-V3 and Qwen3.
SIZES = ((8192, 32000), (4096, 129280), (2048, 151936))
TYPES = ("float32", "bfloat16")


def measure(rows: int, vocabulary: int, dtype: str) -> tuple[float, float]:
    """Return (peak over the bytes of the logits, seconds of processor time of both passes)."""
    import torch

    from async_rl.trainer.logprobs import token_logprobs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    small = torch.randn(4, vocabulary).to(kind).requires_grad_()
    token_logprobs(small, torch.zeros(4, dtype=torch.int64))[0].sum().backward()  # what a first call allocates
    logits = torch.empty(rows, vocabulary, dtype=kind).normal_().requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, began = resident_bytes(peak=False), time.process_time()
    values, _entropy = token_logprobs(logits, targets, 0.7)
    values.sum().backward()
    seconds = time.process_time() - began
    assert logits.grad is not None
    return (resident_bytes(peak=True) - before) / (logits.numel() * logits.element_size()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    ratios: dict[str, float] = {}
    rates = []
    for rows, vocabulary in SIZES:
        for dtype in TYPES:
            size = rows * vocabulary * {"float32": 4, "bfloat16": 2}[dtype] / 1e9
            name = f"{rows} x {vocabulary} {dtype}"
            for _ in range(arguments.rounds):
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    ratio, seconds = process.submit(measure, rows, vocabulary, dtype).result()
                ratios[name] = round(max(ratio, ratios.get(name, 0.0)), 3)
                rates.append(size / seconds)
                print(f"{name:24} logits {size:5.2f} GB   peak {ratio:.3f} of that   {seconds:.2f} s", flush=True)
    rate = round(statistics.median(rates), 3)
    print(json.dumps({"peak_over_logits": max(ratios.values()), "by_size": ratios, "gb_per_s": rate}))


if __name__ == "__main__":
    main()
