"""A repair of vLLM 0.30: without it a weight update on CPU leaves the output layer of a tied model as it was.

A linear layer of a CPU engine computes with a packed copy of its weight, which is made when weights are loaded into the
layer. With tied embeddings the output layer shares the parameter of the embeddings, and is never loaded itself: a
reload brings the parameter up to date and not the copy. Sequences were then scored with the hidden states of the new
weights and the output layer of the old ones.

Only CPU engines are touched: elsewhere both layers compute with the parameter itself. The test
``test_vllm_still_keeps_the_packed_output_layer_of_a_tied_model`` fails once vLLM repairs it, and then this file can go.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from async_rl.errors import WeightSyncError


def packed_without_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Return the layers with a packed copy that received nothing; call it after the load, before it is finalized."""
    unloaded = {}
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if hasattr(layer, "cpu_linear") and info.can_load() and info.load_numel == 0 and not _is_padding(layer):
            unloaded[name] = layer
    return unloaded


def _is_padding(layer: torch.nn.Module) -> bool:
    """Return whether a rank has no row of the vocabulary, which vLLM pads to 64 for each tensor-parallel rank."""
    shard = getattr(layer, "shard_indices", None)
    return shard is not None and shard.num_org_elements == 0


def repack_tied(model: torch.nn.Module, unloaded: dict[str, Any]) -> int:
    """Pack the weights of ``unloaded`` layers that share them with a loaded one; call it when the load is finalized.

    Returns the number of layers packed. Raises WeightSyncError for a layer whose weights are its own: it would compute
    with the old ones.
    """
    loaded = {
        id(layer.weight) for name, layer in model.named_modules() if name not in unloaded and hasattr(layer, "weight")
    }
    for name, layer in unloaded.items():
        if id(layer.weight) not in loaded:
            raise WeightSyncError(
                f"the weight transfer had no weights for {name}, which are not tied to those of another layer; compare "
                "the names that the weight source yields with the checkpoint"
            )
        layer.quant_method.process_weights_after_loading(layer)
    return len(unloaded)
