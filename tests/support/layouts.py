"""A small model and batches for it, and the layouts that must compute the same with them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np

from async_rl.trainer.packing import split_over_ranks
from async_rl.types import Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped, with_trajectories
from tests.support.ranks import run_config

# Layer 1 is dense: a shift between layers and MoE layers would show.
SPEC = RoutingSpec(num_moe_layers=3, top_k=2, num_experts=8)
VOCAB = 64
# The largest difference between layouts: float32 sums in another order.
TOLERANCE = 1e-5

# What `make test` runs of the layouts: every kind of parallelism but virtual stages. The others are in `make test-all`.
QUICK = ("TP2 x EP2 x PP2", "CP2")

LAYOUTS = {
    "DP2": {"dp": 2},
    "TP2": {"tp": 2},
    "EP2": {"dp": 2, "ep": 2},
    "PP2": {"pp": 2},
    "VPP2": {"pp": 2, "vpp": 2},
    "CP2": {"cp": 2},
    "TP2, ETP2": {"tp": 2, "etp": 2},
    "TP2 x EP2 x PP2": {"tp": 2, "ep": 2, "pp": 2},
    "DP2 x EP2": {"dp": 4, "ep": 2},
    "TP2 x CP2": {"tp": 2, "cp": 2, "ep": 2},
}


def make_checkpoint(folder, layers=4, dense=(1,)):
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=SPEC.num_experts,
        num_experts_per_tok=SPEC.top_k,
        moe_intermediate_size=16,
        mlp_only_layers=list(dense),
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.15,  # ten times the usual: logits and routers that are not degenerate
        tie_word_embeddings=True,
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)


def random_rows(rows, rng):
    order = rng.random((rows, SPEC.num_moe_layers, SPEC.num_experts)).argsort(-1)
    return order[..., : SPEC.top_k].astype(np.uint8)


def make_groups(count=6, n=3, seed=0):
    """Partial rollouts of versions 2 to 4, every fifth without routing, no length a multiple of anything."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        prompt = Prompt(f"{seed}-{g}", g + 1, "", rng.integers(0, VOCAB, int(rng.integers(1, 20))).astype(np.int32), {})
        trajectories, rewards = [], []
        for t in range(n):
            length = int(rng.integers(2, 50))
            versions = np.sort(rng.integers(2, 5, length)).astype(np.int32)
            cuts = [0, *(i for i in range(1, length) if versions[i] != versions[i - 1]), length]
            routed = (g * n + t) % 5 > 0
            ids, logprobs = rng.integers(0, VOCAB, length), rng.normal(-4.0, 0.3, length)
            rewards.append(float(rng.random()))
            trajectories.append(
                Trajectory(
                    trajectory_id=f"{seed}-{g}/{t}",
                    prompt_ids=prompt.token_ids,
                    response_ids=ids.astype(np.int32),
                    logprobs=logprobs.astype(np.float32),
                    versions=versions,
                    segments=tuple(Segment(a, b, int(versions[a])) for a, b in pairwise(cuts)),
                    finish_reason="stop",
                    routed_experts=random_rows(len(prompt.token_ids) + length - 1, rng) if routed else None,
                    routing_spec=SPEC if routed else None,
                )
            )
        groups.append(grouped(f"{seed}-{g}.0", prompt, trajectories, rewards))
    return groups


def without_routing(group):
    return with_trajectories(group, lambda one: replace(one, routed_experts=None, routing_spec=None))


def shared_out(groups, ranks):
    shares = split_over_ranks([group.num_tokens for group in groups], ranks)
    return [[groups[index] for index in share] for share in shares]


def config_of(folder, layout, **settings):
    sizes = {f"trainer__parallel__{name}": size for name, size in layout.items()}
    settings = {"trainer__router_replay": "R3", "trainer__tokens_per_microbatch": 160} | settings
    return run_config(folder, **sizes, **settings)


def probes():
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (40, 2, 1, 23)]


def train_and_probe(trainer, updates):
    """Make the updates, each given as groups by data-parallel index, and probe the model."""
    reports = [trainer.train_step(shares[trainer._place.dp], version=4, oldest_version=3) for shares in updates]
    source = trainer.weights()
    weights = {name: None if w is None else w.detach().numpy().copy() for name, w in source}
    for name, tensor in gathered_by_tensor(trainer):
        np.testing.assert_array_equal(weights[name], tensor, name)
    # A weight sync sizes the receiving buffers by the metadata, and fills them with the tensors.
    declared = {meta.name: meta.shape for meta in source.metadata()}
    assert list(declared) == list(weights)
    assert all(declared[name] == w.shape for name, w in weights.items() if w is not None)
    ids = probes()
    rows = [random_rows(len(one) - 1, np.random.default_rng(len(one))) for one in ids]
    probed = trainer.logprobs(ids, rows), trainer.native_routing(ids), trainer.fingerprints(ids, rows)
    return reports, weights, probed


def gathered_by_tensor(trainer):
    from async_rl.trainer.megatron import platform
    from tests.support.tensor_gather import TensorGather

    modules, groups = [chunk.module for chunk in trainer._chunks], trainer._groups
    layout = platform.layout(trainer._device)
    return TensorGather(modules, trainer._model_config, trainer._place, layout, groups.tensor, groups.expert_tensor)


def differences(found, expected):
    """Return by name how far two results of ``train_and_probe`` are apart, relative to the largest value of each."""
    (reports, weights, probed), (expected_reports, expected_weights, expected_probed) = found, expected
    return {
        "loss": largest([r.loss for r in reports], [r.loss for r in expected_reports]),
        "gradient norm": largest([r.grad_norm for r in reports], [r.grad_norm for r in expected_reports]),
        "parameters": max(relative(weights[name], expected_weights[name]) for name in expected_weights),
        "log-probs": largest(probed[0], expected_probed[0]),
        "fingerprints": largest(probed[2], expected_probed[2]),
    }


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def largest(found, expected):
    assert len(found) == len(expected)
    return max(relative(a, b) for a, b in zip(found, expected, strict=True) if np.size(b))
