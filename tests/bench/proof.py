"""Proof of value: the losses of fixed updates of the real trainer, so that a refactoring can show that it changed none.

    python -m tests.bench.proof --write before.json      # on the commit before the change
    python -m tests.bench.proof --against before.json    # on the commit after it

Each case trains the same small random MoE, with a dense layer in it, for a few updates on the same batches, on one CPU
thread in float32. The cases cover every loss, R3, R2 and no replay, exact segments, packing into several
microbatches, and supervised steps. What they record are losses, gradient norms and a digest of the trained weights.
Two runs on one machine agree to the last bit. Another processor or another build of torch may round differently, so
compare only what one machine computed.

Check the other commit out next to this one, and run its code with this file and this environment:

    git worktree add /tmp/before COMMIT
    cp tests/bench/proof.py /tmp/before/tests/bench/proof.py
    (cd /tmp/before && PYTHONPATH=. "$OLDPWD/.venv/bin/python" -m tests.bench.proof --write /tmp/before.json)
    python -m tests.bench.proof --against /tmp/before.json
    git worktree remove --force /tmp/before

Of the package this file uses three names only: ``Trainer``, ``validate`` and the records of ``async_rl.types``.

Printed last is one JSON line: ``digest`` of all figures, ``cases``, ``seconds``, and with --against ``identical``. The
exit code is 1 when the figures differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.types import Group, Prompt, RolloutRecord, RoutingSpec, Segment, Trajectory

UPDATES = 3
GROUPS, RESPONSES, PROMPT_TOKENS = 3, 4, 6
VOCAB = 40
VERSION, OLDEST_VERSION = 4, 2
SPEC = RoutingSpec(num_moe_layers=3, top_k=2, num_experts=6)

# Of a report, what a changed computation would change first. Counts and times are left out: they do not say that the
# model learns the same.
FIGURES = ("loss", "grad_norm", "ppo_kl_k3", "entropy", "clip_fraction", "effective_sample_size_ratio")

ROUTING = "async_training.partial_rollout.routing"
CASES: dict[str, dict[str, Any]] = {
    "ppo, R3": {},
    "ppo, R2": {"trainer.router_replay": "R2"},
    "ppo, no replay": {"trainer.router_replay": "off"},
    "ppo, exact segments": {ROUTING: "exact"},
    "ppo, several microbatches": {"trainer.tokens_per_microbatch": 100, "trainer.microbatch_multiple": 16},
    "ppo, full recomputation": {"trainer.recompute": "full"},
    "ppo, dual clip, sequence mean": {"trainer.loss.dual_clip": 3.0, "trainer.loss.aggregation": "sequence_mean"},
    "ppo, recomputed proximal": {"trainer.loss.proximal": "recompute", "trainer.loss.importance.level": "token"},
    "ppo, interpolated proximal": {
        "trainer.loss.proximal": "interpolate",
        "trainer.loss.importance.level": "sequence",
        "trainer.loss.importance.mode": "mask",
    },
    "ppo, kl penalty": {"trainer.loss.kl": "k3", "trainer.loss.kl_coef": 0.1},
    "gspo, R2": {"trainer.loss.policy": "gspo", "trainer.router_replay": "R2"},
    "cispo, rloo, exact segments": {
        "trainer.loss.policy": "cispo",
        "trainer.loss.advantage": "rloo",
        ROUTING: "exact",
    },
    "reinforce, fixed length": {
        "trainer.loss.policy": "reinforce",
        "trainer.loss.advantage": "reinforce_plus_plus",
        "trainer.loss.aggregation": "fixed_length",
    },
}


def save_model(folder: Path) -> None:
    """Write a random Qwen3-MoE whose second layer is dense, so that a shift between layers and MoE layers shows."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=SPEC.num_moe_layers + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        num_experts=SPEC.num_experts,
        num_experts_per_tok=SPEC.top_k,
        moe_intermediate_size=24,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        initializer_range=0.15,  # Ten times the usual, so that logits and routers are not degenerate.
        dtype="float32",
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def make_groups(seed: int) -> list[Group]:
    """Return groups of two-segment trajectories with random routing, which only replay can reproduce."""
    rng = np.random.default_rng(seed)

    def experts(rows: int) -> np.ndarray:
        order = rng.random((rows, SPEC.num_moe_layers, SPEC.num_experts)).argsort(-1)
        return order[..., : SPEC.top_k].astype(np.uint8)

    groups = []
    for number in range(GROUPS):
        name = f"{seed}-{number}"
        prompt = Prompt(name, number + 1, "", rng.integers(0, VOCAB, PROMPT_TOKENS).astype(np.int32))
        rollouts = []
        for index in range(RESPONSES):
            length = int(rng.integers(6, 60))
            cut = length // 2
            ids, logprobs = rng.integers(0, VOCAB, length), rng.normal(-3.5, 0.2, length)
            first, reward = experts(PROMPT_TOKENS + cut - 1), float(rng.random())
            # The first half is one version too old in every fourth trajectory: those tokens are masked.
            old = VERSION - 2 - (index == 3)
            trajectory = Trajectory(
                trajectory_id=f"{name}.0/{index}",
                prompt_ids=prompt.token_ids,
                response_ids=ids.astype(np.int32),
                logprobs=logprobs.astype(np.float32),
                versions=np.repeat([old, VERSION], [cut, length - cut]).astype(np.int32),
                segments=(Segment(0, cut, old, first), Segment(cut, length, VERSION)),
                finish_reason="stop",
                routed_experts=experts(PROMPT_TOKENS + length - 1),
                routing_spec=SPEC,
            )
            rollouts.append(RolloutRecord.of(trajectory, reward))
        groups.append(Group(f"{name}.0", prompt, tuple(rollouts)))
    return groups


def without_own_routing(groups: list[Group]) -> list[Group]:
    """Return the groups as every policy but ``exact`` has them: with the rows of the whole trajectory only."""

    def without(trajectory: Trajectory) -> Trajectory:
        return replace(trajectory, segments=tuple(replace(s, routed_experts=None) for s in trajectory.segments))

    return [
        replace(
            group,
            rollouts=tuple(
                replace(rollout, trajectories=tuple(map(without, rollout.trajectories))) for rollout in group.rollouts
            ),
        )
        for group in groups
    ]


def run_config(model: Path, settings: dict[str, Any]) -> Any:
    """Return the settings of one case as a RunConfig."""
    from async_rl.config.loading import validate

    tree: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 128},
        # Large enough that the second loss depends on the first update.
        "trainer": {"optimizer": {"lr": 1e-2, "weight_decay": 0.01}, "router_replay": "R3"},
        "resources": {"device": "cpu"},
    }
    for key, value in settings.items():
        *sections, leaf = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return validate(tree)


def weights_digest(trainer: Any, folder: Path) -> str:
    """Return a digest of the trained weights as the Hugging Face folder that the trainer exports has them."""
    from safetensors.numpy import load_file

    trainer.save_hf(folder)
    digest = hashlib.blake2b(digest_size=8)
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(shard).items()):
            digest.update(name.encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def policy_updates(model: Path, settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the figures of each update of one case, and the digest of the weights after the last."""
    from async_rl.trainer.trainer import Trainer

    trainer = Trainer(run_config(model, settings))
    try:
        updates = []
        for seed in range(UPDATES):
            groups = make_groups(seed)
            if settings.get(ROUTING) != "exact":
                groups = without_own_routing(groups)
            report = trainer.train_step(groups, version=VERSION, oldest_version=OLDEST_VERSION)
            updates.append({name: getattr(report, name) for name in FIGURES} | {"kl": report.agreement.kl})
        return {"updates": updates, "weights": weights_digest(trainer, scratch)}
    finally:
        trainer.close()


def supervised_updates(model: Path, scratch: Path) -> dict[str, Any]:
    """Return the losses of supervised steps, and the digest of the weights after the last."""
    from async_rl.trainer.trainer import Trainer

    rng = np.random.default_rng(1)
    ids = [rng.integers(0, VOCAB, size).astype(np.int32) for size in (60, 2, 33, 17)]
    batch = [(sequence, np.arange(len(sequence)) >= 3) for sequence in ids]
    trainer = Trainer(run_config(model, {"trainer.router_replay": "off"}))
    try:
        updates = [{"loss": trainer.supervised_step(batch)} for _ in range(UPDATES)]
        return {"updates": updates, "weights": weights_digest(trainer, scratch)}
    finally:
        trainer.close()


def measure() -> dict[str, Any]:
    """Return the figures of every case by its name."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        save_model(model)
        found = {"supervised": supervised_updates(model, Path(temporary) / "supervised")}
        for number, (name, settings) in enumerate(CASES.items()):
            found[name] = policy_updates(model, settings, Path(temporary) / str(number))
            first = found[name]["updates"][0]
            print(f"{name:30s} loss {first['loss']:+.9f}  grad_norm {first['grad_norm']:.9f}", flush=True)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line for each case that is missing on a side, or whose figures are not the same to the last bit."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            lines.append(f"{name}: only {'after' if name in after else 'before'} the change")
        elif before[name] != after[name]:
            pairs = zip(before[name]["updates"], after[name]["updates"], strict=True)
            changed = [
                f"update {index} {figure} {a.get(figure)!r} -> {b.get(figure)!r}"
                for index, (a, b) in enumerate(pairs, start=1)
                for figure in sorted(a.keys() | b.keys())
                if a.get(figure) != b.get(figure)
            ]
            lines.append(f"{name}: {changed[0] if changed else 'the trained weights'}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--write", type=Path, metavar="FILE", help="write the figures to FILE")
    way.add_argument("--against", type=Path, metavar="FILE", help="compare them with those in FILE")
    arguments = parser.parse_args()
    # Read first, so that a wrong path does not cost a run.
    before = None if arguments.against is None else json.loads(arguments.against.read_text())
    began = time.monotonic()
    found = measure()
    text = json.dumps(found, indent=1, sort_keys=True)
    if arguments.write is not None:
        arguments.write.write_text(text + "\n")
    result: dict[str, Any] = {
        "digest": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        "cases": len(found),
        "seconds": round(time.monotonic() - began, 1),
    }
    if before is not None:
        changed = differences(before, found)
        print("".join(f"DIFFERS  {line}\n" for line in changed), end="")
        result["identical"] = not changed
    print(json.dumps(result))
    return 0 if result.get("identical", True) else 1


if __name__ == "__main__":
    sys.exit(main())
