"""A repair of vLLM 0.30: without it a weight update on CPU silently corrupts MoE models.

The expert weights of a CPU engine are packed for its kernel when they are first loaded. ``UnquantizedFusedMoEMethod``
packs only while its ``moe_kernel`` is unset, so a second load copies plain weights into storage that the kernel reads
as packed: sending a model its own weights moved log-probs by 0.04 on average. Without a kernel, a reload takes the
path of the first load and is exact to the bit.

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
    """Reset the kernel of each MoE layer; call it before each reload. Returns the number of layers.

    Raises WeightSyncError for a version of vLLM that it was not written for.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 0
    if not vllm.__version__.startswith(VLLM_VERSION):
        raise WeightSyncError(
            f"MoE weights can be reloaded on the CPU with vLLM {VLLM_VERSION}x, but vLLM is {vllm.__version__}; "
            f"install vLLM {VLLM_VERSION}x"
        )
    count = 0
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
            count += 1
    return count
