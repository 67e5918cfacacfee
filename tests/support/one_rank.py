"""A trainer on one rank, in a process of its own: small models, batches for them, and the outcome of a step.

Functions that take a ``path`` are called in that process (``ranks.call``): Megatron's state is global and its patches
for the CPU reach into torch, so no model is built in the test process.
"""

from __future__ import annotations

import numpy as np
import pytest

from async_rl.types import Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped
from tests.support.ranks import run_config

# Layer 1 is dense: a shift between layers and MoE layers would show.
SPEC = RoutingSpec(num_moe_layers=3, top_k=2, num_experts=6)
VOCAB = 40


def make_checkpoints(folder):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,  # ten times the usual: logits and routers that are not degenerate
    }
    experts = {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    }
    models = {
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, num_hidden_layers=4, norm_topk_prob=True)),
        "pre_softmax": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape, **experts, num_hidden_layers=4, norm_topk_prob=False)
        ),
        "dense": Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=2, tie_word_embeddings=True, rope_theta=5e5)),
    }
    for name, model in models.items():
        model.float().save_pretrained(folder / name)


def hf_logprobs(path, sequences, temperature=1.0):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    result = []
    for ids in sequences:
        with torch.no_grad():
            logits = model(torch.from_numpy(ids).long()[None]).logits[0, :-1] / temperature
        result.append(logits.log_softmax(-1).gather(-1, torch.from_numpy(ids).long()[1:, None])[:, 0].numpy())
    return result


class Opened:
    """A Trainer that is closed at the end, and the maps that its routers really executed."""

    def __init__(self, path, **overrides):
        import torch

        from async_rl.trainer.trainer import Trainer

        torch.set_num_threads(1)
        self.trainer = Trainer(run_config(path, **overrides))
        self.executed = []  # bool[T, E] per call of a router, in order

    def __enter__(self):
        from megatron.core.transformer.moe.router import TopKRouter

        for module in self.trainer._chunks[0].modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(lambda _m, _i, output: self.executed.append(output[1].numpy().copy()))
        return self.trainer, self.executed

    def __exit__(self, *_):
        self.trainer.close()


def parameters(trainer, what="data"):
    return {name: getattr(p, what).detach().numpy().copy() for name, p in trainer._chunks[0].module.named_parameters()}


def sequences(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (60, 2, 1, 33, 17)[:count]]


def random_rows(rows, seed=0):
    """Return random distinct experts, unlike a router's choice: uint8[rows, L, K]."""
    order = np.random.default_rng(seed).random((rows, SPEC.num_moe_layers, SPEC.num_experts)).argsort(-1)
    return order[..., : SPEC.top_k].astype(np.uint8)


def as_map(rows):
    """Turn experts [T, K] into a routing map bool[T, E]."""
    mapped = np.zeros((len(rows), SPEC.num_experts), bool)
    np.put_along_axis(mapped, rows.astype(np.int64), values=True, axis=1)
    return mapped


def make_groups(count=3, n=3, version=4, routing=True, seed=0, epoch=0):
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        prompt = Prompt(f"{epoch}-{g}", g + 1, "", rng.integers(0, VOCAB, 6).astype(np.int32), fields={})
        trajectories, rewards = [], []
        for t in range(n):
            length = int(rng.integers(6, 30))
            cut = length // 2
            ids, logprobs = rng.integers(0, VOCAB, length), rng.normal(-3.5, 0.2, length)
            rewards.append(float(rng.random()))
            trajectories.append(
                Trajectory(
                    trajectory_id=f"{epoch}-{g}.0/{t}",
                    prompt_ids=prompt.token_ids,
                    response_ids=ids.astype(np.int32),
                    logprobs=logprobs.astype(np.float32),
                    versions=np.repeat([version - 2, version], [cut, length - cut]).astype(np.int32),
                    segments=(Segment(0, cut, version - 2), Segment(cut, length, version)),
                    finish_reason="stop",
                    routed_experts=random_rows(6 + length - 1, seed + 100 * g + t) if routing else None,
                    routing_spec=SPEC if routing else None,
                )
            )
        groups.append(grouped(f"{epoch}-{g}.0", prompt, trajectories, rewards))
    return groups


def step(trainer, groups, oldest_version=2):
    return trainer.train_step(groups, version=4, oldest_version=oldest_version)


def train_once(path, groups, overrides, oldest_version=2):
    with Opened(path, **overrides) as (trainer, executed):
        report = step(trainer, groups, oldest_version)
        return report, parameters(trainer, "main_grad"), parameters(trainer), len(executed)


def assert_same_agreement(got, wanted):
    assert got.tokens == wanted.tokens
    for field in ("kl", "abs_mean", "abs_max"):
        assert getattr(got, field) == pytest.approx(getattr(wanted, field), rel=1e-4, abs=1e-6), field


def assert_close(got, expected, rtol=1e-5, atol=1e-7):
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=rtol, atol=atol, err_msg=name)
