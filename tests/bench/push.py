"""What a weight push costs the trainer's ranks, for 128 experts x 48 layers: calls, messages, bytes and copies.

Several ranks over gloo bring the weights to rank 0: tensor by tensor, as before (``tests.support.tensor_gather``),
and packed (``trainer.megatron.gather``); and packed to the first rank of each stage, as with sync.senders stages.
Widths are those of Qwen3-30B-A3B scaled down, and so is the bucket: to 0.4 of a layer, which the default of
sync.gather_bucket_bytes is of a layer of that model in bfloat16. Counted is the busiest rank, and for copies rank 0
and all. Prints one JSON line with the figures of each layout and, as ratios to the limit, the worst of all layouts:
calls by layer, collectives among them, to 4 (``calls_over_limit``), and bytes that a rank sends to 1.1 of those that
it has (``sent_over_limit``).

    .venv/bin/python -m tests.bench.push
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from async_rl.config.training import ParallelSection
from async_rl.trainer.parallel import Place
from tests.support import spread_model
from tests.support.spread_model import QWEN

LAYOUTS = {
    "ep4": {"dp": 4, "ep": 4},
    "tp2_ep2_pp2": {"tp": 2, "ep": 2, "pp": 2},
    "tp2_etp2_pp2": {"tp": 2, "etp": 2, "pp": 2},
}
LAYERS, EXPERTS = 48, 128
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
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.layers, arguments.experts, LAYOUTS)))


if __name__ == "__main__":
    main()
