"""A training step of this trainer against the same step in plain transformers: same model, same batches, in turns.

Both take the policy loss on the same long-tailed responses and update with AdamW, in float32 on one thread each; only
one of the two works at a time. transformers does what a plain loop does: a microbatch padded to its longest sequence,
sorted by length so that this costs it little.

Prints per round, then one JSON line: tokens_per_s_over_transformers (median over rounds), peak_memory_ratio (of what a
process's resident memory has grown by at most since its model was loaded), and the padding that each side computed.

    .venv/bin/python -m tests.bench.trainer [--rounds 7] [--groups 8] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.types import Group, Prompt, Segment, Trajectory
from tests.support.groups import grouped

RESPONSES = 8
LONGEST = 480
VOCAB = 32


def make_groups(count: int, seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        prompt = Prompt(f"{seed}-{g}", g + 1, "", rng.integers(0, VOCAB, 24).astype(np.int32), {})
        lengths = rng.lognormal(4.3, 0.9, RESPONSES).astype(int).clip(4, LONGEST)
        trajectories = tuple(
            Trajectory(
                trajectory_id=f"{seed}-{g}/{i}",
                prompt_ids=prompt.token_ids,
                response_ids=rng.integers(0, VOCAB, int(n)).astype(np.int32),
                logprobs=rng.normal(-3.4, 0.1, int(n)).astype(np.float32),
                versions=np.zeros(int(n), np.int32),
                segments=(Segment(0, int(n), 0),),
                finish_reason="stop",
            )
            for i, n in enumerate(lengths)
        )
        groups.append(grouped(f"{seed}-{g}.0", prompt, trajectories, rng.random(RESPONSES).tolist()))
    return groups


def resident_bytes(*, peak: bool) -> int:
    """Return the resident memory of this process now, or its ``peak`` so far."""
    name = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


_side: Any = None
_loaded_bytes = 0


def open_side(side: str, folder: Path, tokens: int) -> None:
    global _side, _loaded_bytes
    import torch

    torch.set_num_threads(1)
    _side = (Ours if side == "trainer" else Transformers)(folder, tokens)
    # From here on the peak is that of steps.
    Path("/proc/self/clear_refs").write_text("5")
    _loaded_bytes = resident_bytes(peak=False)


def step(groups: list[Group]) -> tuple[float, float]:
    """Train one step; return (seconds, share of computed positions that are padding)."""
    began = time.perf_counter()
    padding = _side.step(groups)
    return time.perf_counter() - began, padding


def grown_bytes() -> int:
    return resident_bytes(peak=True) - _loaded_bytes


class Ours:
    def __init__(self, folder: Path, tokens: int) -> None:
        from async_rl.config.loading import validate
        from async_rl.trainer.trainer import Trainer

        settings = {"router_replay": "off", "tokens_per_microbatch": tokens}
        tree = {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": "unused", "max_prompt_tokens": 24},
            "rollout": {"max_response_tokens": LONGEST},
            "trainer": settings,
            "resources": {"device": "cpu"},
        }
        self._trainer = Trainer(validate(tree))

    def step(self, groups: list[Group]) -> float:
        return self._trainer.train_step(groups, version=0, oldest_version=0).padding_ratio


class Transformers:
    def __init__(self, folder: Path, tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._adam = torch.optim.AdamW(self._model.parameters(), lr=1e-6, weight_decay=0.0)
        self._tokens = tokens

    def step(self, groups: list[Group]) -> float:
        import torch

        samples = []
        for group in groups:
            rewards = group.rewards.astype(np.float64)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            samples += list(zip(group.trajectories, advantages.tolist(), strict=True))
        samples.sort(key=lambda pair: -pair[0].num_tokens)
        total = sum(len(t.response_ids) for t, _ in samples)
        computed = used = 0
        while samples:
            longest = samples[0][0].num_tokens
            batch, samples = samples[: max(1, self._tokens // longest)], samples[max(1, self._tokens // longest) :]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            attention, mask = torch.zeros_like(ids), torch.zeros(len(batch), longest - 1)
            behaviour, weight = torch.zeros_like(mask), torch.zeros_like(mask)
            for row, (one, advantage) in enumerate(batch):
                n, p = one.num_tokens, len(one.prompt_ids)
                ids[row, :n] = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids]))
                attention[row, :n] = 1
                mask[row, p - 1 : n - 1] = 1
                behaviour[row, p - 1 : n - 1] = torch.from_numpy(one.logprobs)
                weight[row, p - 1 : n - 1] = advantage
                used += n - 1
            computed += ids.numel() - len(batch)
            logits = self._model(ids[:, :-1], attention_mask=attention[:, :-1], use_cache=False).logits
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            ratio = torch.exp((logprobs - behaviour) * mask)
            loss = -torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight) * mask
            (loss.sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return 1 - used / computed


def save_model(folder: Path) -> None:
    from async_rl.demo.model import save_random_model

    save_random_model(folder, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--groups", type=int, default=8, help="per step")
    parser.add_argument("--tokens", type=int, default=4096, help="per microbatch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        sides = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in ("trainer", "transformers")}
        sides["trainer"].submit(save_model, folder).result()
        for name, process in sides.items():
            process.submit(open_side, name, folder, arguments.tokens).result()
        ratios, padding = [], {}
        for number in range(arguments.rounds + 1):
            groups = make_groups(arguments.groups, number)
            tokens = sum(t.num_tokens for group in groups for t in group.trajectories)
            seconds = {}
            # In turns, and each side first as often as the other.
            for name in sorted(sides, reverse=bool(number % 2)):
                seconds[name], padding[name] = sides[name].submit(step, groups).result()
            if number == 0:
                continue  # first calls compile and allocate
            ratios.append(seconds["transformers"] / seconds["trainer"])
            rates = {name: f"{tokens / value:7.0f} tokens/s" for name, value in seconds.items()}
            print(f"trainer {rates['trainer']}   transformers {rates['transformers']}   ratio {ratios[-1]:.2f}")
        grown = {name: process.submit(grown_bytes).result() for name, process in sides.items()}
        for process in sides.values():
            process.shutdown()
    print(
        json.dumps(
            {
                "tokens_per_s_over_transformers": round(statistics.median(ratios), 3),
                "peak_memory_ratio": round(grown["trainer"] / grown["transformers"], 3),
                "peak_bytes_trainer": grown["trainer"],
                "peak_bytes_transformers": grown["transformers"],
                "padding_trainer": round(padding["trainer"], 4),
                "padding_transformers": round(padding["transformers"], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
