"""A repair of vLLM 0.30: without it a weight update on CPU silently corrupts MoE models.

The expert weights of a CPU engine are packed for its kernel when they are first loaded. ``UnquantizedFusedMoEMethod``
packs only while its ``moe_kernel`` is unset, so a second load copies plain weights into storage that the kernel reads
as packed: pushing a model's own weights moved log-probs by 0.04 on average. With the kernel forgotten beforehand a
reload takes the path of the first load, and is exact to the bit.

Only CPU engines are touched: elsewhere CUDA graphs hold the addresses that the kernel was built with. The test
``test_vllm_still_skips_packing_on_reload`` fails once vLLM packs on its own, and then this file can go.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm

from async_rl.errors import WeightSyncError

VLLM_VERSION = "0.30."


def forget_moe_kernels(model: torch.nn.Module) -> int:
    """Call before each reload. Returns how many layers it reset; raises WeightSyncError for an unknown vLLM."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 0
    if not vllm.__version__.startswith(VLLM_VERSION):
        raise WeightSyncError(f"reloading MoE weights on CPU is known for vLLM {VLLM_VERSION}x, not {vllm.__version__}")
    count = 0
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
            count += 1
    return count
