"""Measures the tensors of a trainer rank in a process of its own, for tests and benchmarks of the doctor's estimate."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.doctor import estimate
from async_rl.doctor.estimate import TrainerMemory
from async_rl.models.config import read_model_config
from async_rl.types import Group, Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped


@dataclass(frozen=True)
class Size:
    """A random model and the lengths that it is trained with."""

    shape: dict[str, int]
    """Fields of config.json."""
    groups: int
    n: int
    prompt: int
    response: int
    sequences: int
    """Sequences that fill a microbatch."""


def _shape(vocabulary: int, hidden: int, layers: int, heads: int, experts: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 64 if hidden > 128 else 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": experts,
    }


SIZES = {
    # Activations dominate, as in the demo; logits, as in small models with a real vocabulary; 105 million parameters.
    "demo": Size(_shape(32, 128, 4, 4, 160), groups=1, n=10, prompt=200, response=200, sequences=10),
    "vocabulary": Size(_shape(49_152, 256, 4, 4, 128), groups=1, n=3, prompt=50, response=100, sequences=3),
    "large": Size(_shape(49_152, 512, 8, 8, 512), groups=2, n=4, prompt=64, response=129, sequences=5),
}


def make_model(folder: Path, size: Size, dtype: str = "float32") -> None:
    """Write a random Qwen3-MoE checkpoint."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size.shape, max_position_embeddings=8192, norm_topk_prob=True))
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def make_groups(config: RunConfig, spec: RoutingSpec, vocabulary: int) -> list[Group]:
    """Make one step's groups with every response as long as the settings allow."""
    prompt_length, length = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    rng = np.random.default_rng(0)
    groups = []
    for g in range(config.trainer.groups_per_step):
        prompt = Prompt(f"0-{g}", g + 1, "", rng.integers(0, vocabulary, prompt_length).astype(np.int32))
        trajectories = []
        for t in range(config.rollout.n):
            shape = (prompt_length + length - 1, spec.num_moe_layers, spec.num_experts)
            routed = rng.random(shape, dtype=np.float32).argsort(-1)[..., : spec.top_k].astype(spec.dtype)
            trajectories.append(
                Trajectory(
                    trajectory_id=f"0-{g}.0/{t}",
                    prompt_ids=prompt.token_ids,
                    response_ids=rng.integers(0, vocabulary, length).astype(np.int32),
                    logprobs=np.full(length, -3.0, np.float32),
                    versions=np.zeros(length, np.int32),
                    segments=(Segment(0, length, 0),),
                    finish_reason="length",
                    routed_experts=routed,
                    routing_spec=spec,
                )
            )
        groups.append(grouped(f"0-{g}.0", prompt, trajectories, [float(t % 2) for t in range(config.rollout.n)]))
    return groups


def settings(folder: Path, size: Size, dtype: str = "float32", **trainer: Any) -> RunConfig:
    """Return a run's settings on the checkpoint of ``folder``, whose microbatches are as full as can be."""
    return validate(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"train": "unused.jsonl", "max_prompt_tokens": size.prompt},
            "rollout": {"n": size.n, "max_response_tokens": size.response},
            "trainer": {
                "groups_per_step": size.groups,
                "tokens_per_microbatch": size.sequences * (size.prompt + size.response - 1),
                **trainer,
            },
            "resources": {"device": "cpu"},
        }
    )


def estimated(config: RunConfig) -> TrainerMemory:
    """Return what doctor expects of the rank."""
    model = read_model_config(config.model.path)
    return estimate.trainer_memory(config, model, gpu=False)


def allocated(config: RunConfig, steps: int = 2) -> tuple[int, int]:
    """Train ``steps``; return the bytes of torch's allocations on the CPU at their peak, and after the last step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = _train(config, steps)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    trainer.close()
    return int(held.max()), int(held[-1])


def taken(trainer: Any) -> dict[str, int]:
    """Return what a rank's tensors take: before a step, and at the peak of one."""
    from torch.profiler import ProfilerActivity, profile

    model, place = trainer._model_config, trainer._place
    assert model.routing_spec is not None
    mine = make_groups(trainer._config, model.routing_spec, model.vocab_size)[place.dp :: place.sizes.dp]
    trainer.train_step(mine, version=0, oldest_version=0)  # Adam has no moments before
    parameters = [each for chunk in trainer._chunks for each in chunk.parameters()]
    adam = trainer._optimizer
    states = [each for state in adam._adam.state.values() for each in state.values()]
    kept = [*parameters, *(each.main_grad for each in parameters), *adam._masters, *states]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    fixed = sum(storages.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step(mine, version=0, oldest_version=0)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return {
        "parameters": sum(each.nbytes for each in parameters),
        "gradients": sum(each.main_grad.nbytes for each in parameters),
        "fixed": fixed,
        "peak": fixed + int(held.max()),
    }


def resident(config: RunConfig, steps: int = 2) -> int:
    """Train ``steps``; return the peak of this process's resident memory in bytes."""
    _train(config, steps).close()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _train(config: RunConfig, steps: int) -> Any:
    import torch

    from async_rl.trainer.trainer import Trainer

    torch.set_num_threads(1)
    model = read_model_config(config.model.path)
    assert model.routing_spec is not None
    groups = make_groups(config, model.routing_spec, model.vocab_size)
    trainer = Trainer(config)
    for _ in range(steps):
        trainer.train_step(groups, version=0, oldest_version=0)
    return trainer
