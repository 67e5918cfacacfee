"""A dense Llama as a Mixtral that computes the same function: sparse upcycling with virtual groups.

Each expert of a layer has one of ``top_k`` slices of the dense MLP. The experts of a group (a "virtual group" in
arXiv:2410.07524) have all slices together, and rows of the router that begin alike, so that the ``top_k`` experts of a
token are one whole group, each with a weight of 1 / top_k. The last projection is multiplied by ``top_k`` in return. A
token takes as much computation as before. In training the rows drift apart, and groups with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from async_rl.demo.chat.smollm import Tensors

_ROUTER_STD = 0.02


def to_mixture(
    config: Mapping[str, Any], tensors: Tensors, *, experts: int, top_k: int, seed: int
) -> tuple[dict[str, Any], Tensors]:
    """Return config.json and tensors of the mixture; ``seed`` is that of the routers.

    Raises ValueError unless ``top_k`` divides the experts and the MLP's width.
    """
    width = config["intermediate_size"]
    if experts % top_k or width % top_k:
        raise ValueError(f"top_k {top_k} must divide the experts ({experts}) and intermediate_size ({width})")
    rng = np.random.default_rng(seed)
    mixture = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for layer in range(config["num_hidden_layers"]):
        dense, moe = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        gate, up, down = (tensors[f"{dense}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        groups = rng.normal(0, _ROUTER_STD, (experts // top_k, config["hidden_size"])).astype(np.float32)
        mixture[f"{moe}.gate.weight"] = np.repeat(groups, top_k, axis=0)
        for expert in range(experts):
            part = slice(expert % top_k * width // top_k, (expert % top_k + 1) * width // top_k)
            for name, slice_ in (("w1", gate[part]), ("w3", up[part]), ("w2", down[:, part] * top_k)):
                mixture[f"{moe}.experts.{expert}.{name}.weight"] = np.ascontiguousarray(slice_)
    changed = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": width // top_k,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
    }
    return {name: value for name, value in config.items() if name != "mlp_bias"} | changed, mixture
