"""The benefit of routing replay: a bfloat16 engine against a float32 trainer, with R3, R2 and without replay.

One training step's groups are recorded from a real run, all of them sampled by the checkpoint's own weights.
Then a fresh trainer on the same weights takes the same step in each mode, so only numerics and routing differ. Printed
last is one JSON line: engine dtype -> mode -> abs_mean, abs_max of |behaviour - trainer log-prob|,
k3, and extreme_token_fraction (importance ratio outside of [1/2, 2]).

    .venv/bin/python -m tests.bench.mismatch [--groups 32] [--config configs/tiny_moe.yaml]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.bench.runs import ROOT, train

MODES = ("R3", "R2", "off")


def record(config: Path, dtype: str, groups: int, folder: Path) -> list[Path]:
    """Return the groups of the first step of a run, as wire-format files."""
    settings = {
        "rollout.dtype": dtype,
        "trainer.steps": 1,
        "trainer.groups_per_step": groups,
        "debug.dump_trajectories": groups,
        "eval.n": 1,
    }
    return sorted((train(config, folder, dtype, settings) / "trajectories").iterdir())


def step(config: Path, mode: str, files: list[Path]) -> dict[str, float]:
    """Train one step with a fresh trainer on these groups, in a process of its own: Megatron's state is global."""
    from async_rl.config.loading import load
    from async_rl.queue import codec
    from async_rl.trainer.trainer import Trainer

    trainer = Trainer(load(config, {"trainer.router_replay": mode, "resources.device": "cpu"}))
    try:
        report = trainer.train_step([codec.decode(f.read_bytes()) for f in files], version=0, oldest_version=0)
    finally:
        trainer.close()
    return {
        "tokens": report.agreement.tokens,
        "abs_mean": report.agreement.abs_mean or 0.0,
        "abs_max": report.agreement.abs_max or 0.0,
        "k3": report.ppo_kl_k3,
        "extreme_token_fraction": report.extreme_token_fraction,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_moe.yaml")
    arguments = parser.parse_args()

    result: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("bfloat16", "float32"):
            files = record(arguments.config, dtype, arguments.groups, Path(folder))
            result[dtype] = {}
            for mode in MODES:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    found = result[dtype][mode] = pool.submit(step, arguments.config, mode, files).result()
                print(
                    f"{dtype:9s} engine  {mode:4s} {found['tokens']:6d} tokens   "
                    f"mean {found['abs_mean']:.2e}   max {found['abs_max']:.2e}   k3 {found['k3']:.2e}   "
                    f"extreme {found['extreme_token_fraction']:.2e}",
                    flush=True,
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
