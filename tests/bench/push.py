"""What a weight push costs: the trainer's ranks in calls, messages and copies, and the links in bytes of a delta.

Several ranks over gloo bring the weights of 128 experts x 48 layers to rank 0: tensor by tensor, as before
(``tests.support.tensor_gather``), and packed (``trainer.megatron.gather``); and packed to the first rank of each stage,
as with sync.senders stages. Widths are those of Qwen3-30B-A3B scaled down, and so is the bucket: to 0.4 of a layer,
which the default of sync.gather_bucket_bytes is of a layer of that model in bfloat16. Counted is the busiest rank, and
for copies rank 0 and all. Prints one JSON line with the figures of each layout and, as ratios to the limit, the worst
of all layouts: calls by layer, collectives among them, to 4 (``calls_over_limit``), and bytes that a rank sends to 1.1
of those that it has (``sent_over_limit``).

Of a delta (sync.delta, ``weights.delta_publisher``): the bytes of one between two steps of a real optimizer over those
of all weights, and the share of elements that have changed. A small Qwen3-MoE in its initial distribution is trained
by AdamW in float32 on random tokens and sent in bfloat16, from the bits of a bfloat16 checkpoint on.

    .venv/bin/python -m tests.bench.push
    .venv/bin/python -m tests.bench.push --only-deltas
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers

from async_rl.config.training import OptimizerSection, ParallelSection
from async_rl.trainer.parallel import Place
from async_rl.weights.delta_publisher import DeltaPublisher
from async_rl.weights.shm_file import TensorMeta
from tests.support import spread_model
from tests.support.spread_model import QWEN

LAYOUTS = {
    "ep4": {"dp": 4, "ep": 4},
    "tp2_ep2_pp2": {"tp": 2, "ep": 2, "pp": 2},
    "tp2_etp2_pp2": {"tp": 2, "etp": 2, "pp": 2},
}
LAYERS, EXPERTS = 48, 128
# Of the deltas: as small as a short bench must be, with the deviation of weights that Qwen3 begins with (0.02).
DELTA_MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "initializer_range": 0.02,
}
DELTA_RATES, DELTA_STEPS = (1e-6, 1e-5), (1, 10, 30)
# Of Qwen3-30B-A3B, over 32.
WIDTHS = {"hidden_size": 64, "moe_intermediate_size": 24, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 4748}
WAYS = ("before", "after", "by_stage")
CALLS_PER_LAYER = 4
OF_SHARE = 1.1
# 512 MiB of the 1.25 GB of a layer with 128 experts of 2048 x 768.
BUCKET_OF_A_LAYER = 0.4


def measure(place: Place, model: Any, layer_bytes: int) -> dict[str, Any]:
    """Return what a rank does in one push, tensor by tensor and packed."""
    from async_rl.trainer.megatron.gather import GatheredWeights
    from tests.support.tensor_gather import TensorGather
    from tests.support.traffic import counted

    part = spread_model.Rank(model, place.sizes, place.rank, "local")
    size = int(BUCKET_OF_A_LAYER * layer_bytes)
    ways = {
        "before": TensorGather(part.chunks, model, place, "local", *part.groups()),
        "after": GatheredWeights(part.chunks, model, place, "local", size),
        "by_stage": GatheredWeights(part.chunks, model, place, "local", size, by_stage=True),
    }
    found: dict[str, Any] = {"held_bytes": part.held_bytes}
    for name, weights in ways.items():
        with counted() as traffic:
            for _ in weights:
                pass
        found[name] = traffic
    return found


def summarize(results: list[dict[str, Any]], name: str, layers: int) -> dict[str, float]:
    """Return the figures of one way to gather."""
    ranks = [result[name] for result in results]
    return {
        "calls_per_layer": round(max(rank.calls for rank in ranks) / layers, 2),
        "messages_per_layer": round(sum(rank.messages for rank in ranks) / layers, 2),
        "sent_of_held": round(
            max(rank.sent_bytes / result["held_bytes"] for rank, result in zip(ranks, results, strict=True)), 3
        ),
        "received_mb_max": round(max(rank.received_bytes for rank in ranks) / 1e6, 2),
        "sent_mb": round(sum(rank.sent_bytes for rank in ranks) / 1e6, 2),
        "copies_on_rank_0": ranks[0].copies,
        "copied_mb_on_rank_0": round(ranks[0].copied_bytes / 1e6, 2),
        "copied_mb": round(sum(rank.copied_bytes for rank in ranks) / 1e6, 2),
    }


def delta_figures(lr: float, reported: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return what the delta of each of the reported steps is, with a constant learning rate."""
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**DELTA_MODEL)).float()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    settings = OptimizerSection()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )

    def sent() -> dict[str, torch.Tensor]:
        return {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}

    table = [TensorMeta.of(name, tensor) for name, tensor in sent().items()]
    publisher = DeltaPublisher(table, lambda array: array.nbytes, full_every=10**6, max_ratio=1.0)
    publisher.publish(sent().items())
    full = publisher.totals.nbytes["full"]
    figures = {}
    for step in range(1, max(reported) + 1):
        tokens = torch.randint(DELTA_MODEL["vocab_size"], (4, 128))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        before = publisher.totals.nbytes["delta"]
        publisher.publish(sent().items())
        if step in reported:
            nbytes = publisher.totals.nbytes["delta"] - before
            changed = publisher.totals.changed or 0.0
            figures[f"step {step}"] = {"bytes_of_full": round(nbytes / full, 4), "changed": round(changed, 4)}
    return figures


def run(layers: int, experts: int, layouts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Measure each of the layouts."""
    model = replace(QWEN, num_layers=layers, num_experts=experts, moe_layers=tuple(range(layers)), **WIDTHS)
    model_bytes = spread_model.total_bytes(model, "local")
    figures: dict[str, Any] = {"tensors": experts * layers * 3, "model_mb": round(model_bytes / 1e6, 2)}
    for name, sizes in layouts.items():
        results = spread_model.run(measure, ParallelSection(**sizes), model, model_bytes // layers)
        figures[name] = {way: summarize(results, way, layers) for way in WAYS}
    after = [figures[name][way] for name in layouts for way in WAYS[1:]]
    return figures | {
        "calls_over_limit": round(max(each["calls_per_layer"] for each in after) / CALLS_PER_LAYER, 2),
        "sent_over_limit": round(max(each["sent_of_held"] for each in after) / OF_SHARE, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--only-deltas", action="store_true")
    arguments = parser.parse_args()
    found = {} if arguments.only_deltas else run(arguments.layers, arguments.experts, LAYOUTS)
    print(json.dumps(found | {"delta": {f"lr {lr:g}": delta_figures(lr, DELTA_STEPS) for lr in DELTA_RATES}}))


if __name__ == "__main__":
    main()
