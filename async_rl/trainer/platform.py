"""The device seam: the only place of the trainer that knows CPU from GPU.

Everything that Megatron-core needs before it runs without a GPU stands here, each patch with its reason and
the version it is for. Importing this module starts and changes nothing; ``activate`` does. Knows Megatron and
torch, no other room.

What differs by device, and where:
    activate            patches Megatron for the CPU; selects the GPU
    init_distributed    gloo or nccl
    layer_spec          Megatron's own modules with our attention and norm, or Transformer Engine's
    model_overrides     settings of TransformerConfig
    optimizer           AdamW of torch, or Megatron's distributed one
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from async_rl.config import OptimizerSection
from async_rl.errors import ResourceError, TrainerError
from async_rl.weights.names import Layout

if TYPE_CHECKING:
    from async_rl.trainer.optimizer import Optimizer

Device = Literal["cpu", "cuda"]

# The patches below follow this version's sources line by line; another one has to be looked at anew.
MEGATRON_VERSION = "0.16.1"

# A rank that waits longer than this for the others is alone: half of Megatron's own default, so that a dead
# peer surfaces as an error within minutes.
COLLECTIVE_TIMEOUT = timedelta(minutes=15)


def resolve(device: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device to compute on. Raises ResourceError for ``cuda`` on a machine without one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("resources.device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return device


def activate(device: Device) -> None:
    """Make Megatron-core usable on ``device`` in this process. Calling it again does nothing more."""
    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise TrainerError(
            f"megatron-core {found} is installed; the trainer is made for {MEGATRON_VERSION}; install that"
        )
    if device == "cpu":
        # Seven lines on every start about Apex and Transformer Engine, which are for GPUs.
        warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|cuda_graph_scope)", module="megatron")
        _patch_cuda_calls()
        _patch_router_gemm()
        _patch_recompute_rng()
    else:
        torch.cuda.set_device(0)  # Ray shows each actor its own GPU alone


def init_distributed(device: Device, rank: int, world_size: int, init_method: str | None) -> None:
    """Start torch.distributed and Megatron's process groups: data parallel over all ranks."""
    from megatron.core import parallel_state

    if init_method is None:
        if world_size != 1:
            raise TrainerError(f"init_method is needed for {world_size} ranks, for example tcp://<host>:<port>")
        store: Any = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            _backend(device), rank=0, world_size=1, store=store, timeout=COLLECTIVE_TIMEOUT
        )
    else:
        torch.distributed.init_process_group(
            _backend(device),
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    # The extra gloo groups serve distributed checkpoints of GPU runs; on CPU every group is gloo already.
    parallel_state.initialize_model_parallel(create_gloo_process_groups=device == "cuda")


def close_distributed() -> None:
    """Undo ``init_distributed``; without it, nothing."""
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def cuda_means(device: Device) -> Iterator[None]:
    """Within it, ``device="cuda"`` in torch calls means ``device``.

    For Megatron's schedules, which name the device in words (0.16.1, ``torch.zeros([], device="cuda")``).
    """
    if device == "cuda":
        yield
        return
    with _CudaMeansCPU():
        yield


def layout(device: Device) -> Layout:
    """Which parameter names a model built by ``layer_spec`` has."""
    return "local" if device == "cpu" else "transformer_engine"


def layer_spec(device: Device, config: Any) -> Any:
    """The decoder's block specification."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from async_rl.trainer.attention import PackedAttention
    from async_rl.trainer.norm import RMSNorm

    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=device == "cuda", normalization=config.normalization
    )
    if device == "cpu":
        # Megatron's own attention refuses packed sequences, its RMSNorm is slow; see the two modules.
        spec.layer_norm = RMSNorm
        for layer in spec.layer_specs:
            parts, attention = layer.submodules, layer.submodules.self_attention.submodules
            parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
            attention.q_layernorm = attention.k_layernorm = RMSNorm
            attention.core_attention = PackedAttention
    return spec


def model_overrides(device: Device) -> dict[str, Any]:
    """Settings of TransformerConfig that depend on the device; none of them changes what is computed."""
    if device == "cpu":
        return {
            "use_cpu_initialization": True,
            # Fused activations go through torch.compile, which wants a C++ compiler on every machine.
            "bias_activation_fusion": False,
            "moe_grouped_gemm": False,
        }
    return {"bias_activation_fusion": True, "moe_grouped_gemm": True, "moe_permute_fusion": True}


def optimizer(device: Device, model: Any, settings: OptimizerSection) -> Optimizer:
    """What applies the gradients that ``model`` (Megatron's DistributedDataParallel) has accumulated.

    Megatron 0.16.1's gradient clipping and distributed optimizer insist on CUDA tensor types.
    """
    from async_rl.trainer import optimizer as optimizers

    kind = optimizers.TorchAdamW if device == "cpu" else optimizers.MegatronAdamW
    return kind(model, settings)


def _backend(device: Device) -> str:
    return "gloo" if device == "cpu" else "nccl"


class _CudaMeansCPU(TorchFunctionMode):  # type: ignore[misc]  # torch has no types here
    """Turns ``device="cuda"`` arguments of torch functions into the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _patch_cuda_calls() -> None:
    """Megatron 0.16.1 puts gradient buffers, rotary table and router weights on torch.cuda.current_device()."""
    torch.cuda.current_device = lambda: torch.device("cpu")


def _patch_router_gemm() -> None:
    """Megatron 0.16.1's router reads ``te_general_gemm``, which is undefined without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _patch_recompute_rng() -> None:
    """Megatron 0.16.1 saves and restores the CUDA generator around recomputation. There is none, and no dropout."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None
