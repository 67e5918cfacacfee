"""The device seam: the only module of the trainer that distinguishes CPU and GPU.

It owns every patch that Megatron-core needs to run without a GPU, each with its reason and the version it is for.
Importing this module starts and changes nothing; ``activate`` does. Knows Megatron and torch, no other room.

Differences between the devices, and where they are:
    activate            patches Megatron for the CPU; selects the GPU
    init_distributed    gloo or nccl
    layout              Megatron's own modules with our attention and norm, or Transformer Engine's
    layer_spec          those modules
    model_overrides     settings of TransformerConfig
    optimizer           AdamW of torch, or Megatron's distributed one

Tests replace ``layout`` to compute with Transformer Engine's layers on a CPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from async_rl.config.training import OptimizerSection
from async_rl.errors import ResourceError, TrainerError
from async_rl.models.names import Layout
from async_rl.trainer.parallel import Place, world_size
from async_rl.trainer.rendezvous import COLLECTIVE_TIMEOUT

if TYPE_CHECKING:
    from async_rl.trainer.megatron.optimizer import Optimizer

Device = Literal["cpu", "cuda"]

# The patches below follow this version's sources line by line; check each of them before changing it.
MEGATRON_VERSION = "0.16.1"
# CUDA's context and libraries, which torch's allocator does not count. Assumed, not measured.
_CONTEXT_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups that one rank belongs to."""

    model: torch.distributed.ProcessGroup
    """Ranks that share this rank's data: those of its data-parallel index, in every pipeline stage."""
    data: torch.distributed.ProcessGroup
    """Ranks with this rank's part of the model and data of their own."""
    context: torch.distributed.ProcessGroup
    """Ranks with other parts of the same sequences."""
    tensor: torch.distributed.ProcessGroup
    """Ranks with other parts of the same dense parameters."""
    expert_tensor: torch.distributed.ProcessGroup
    """Ranks with other parts of the same experts."""

    @property
    def vocabulary(self) -> torch.distributed.ProcessGroup | None:
        """The group over which logits are split; None if they are not."""
        return self.tensor if self.tensor.size() > 1 else None


def resolve(device: Literal["auto", "cpu", "cuda"]) -> Device:
    """Return the device to compute on. Raises ResourceError for ``cuda`` on a machine without one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("resources.device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return device


def activate(device: Device, engine_share: float = 0.0) -> None:
    """Make Megatron-core usable on ``device`` in this process. Further calls have no effect.

    engine_share: share of this GPU's memory that an engine has.

    Raises TrainerError for another version of Megatron-core than the patches are made for.
    """
    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise TrainerError(
            f"megatron-core {found} is installed, but the trainer is made for {MEGATRON_VERSION}; install that version"
        )
    # Before Megatron is imported. It uses functions that torch calls deprecated; other warnings are about GPUs.
    for module in (r"torch\.distributed", r"megatron\.core\.dist_checkpointing", r"async_rl\.trainer"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    if device == "cpu":
        for_gpus = ".*(Apex|Transformer Engine|cuda_graph_scope|CUDA_DEVICE_MAX)"
        warnings.filterwarnings("ignore", message=for_gpus, module="megatron")
    _patch_pipeline_shapes()
    if device == "cpu":
        _patch_cuda_calls()
        _patch_dispatcher()
        _patch_rng()
    else:
        torch.cuda.set_device(0)  # Ray shows each actor its own GPU alone
        if engine_share:
            _leave_memory(engine_share)
    if layout(device) == "local":
        _patch_transformer_engine()


def _leave_memory(engine_share: float) -> None:
    """Bound this process's memory, so that an engine which is started again finds its own free."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1 - engine_share - _CONTEXT_BYTES / total)


def init_distributed(device: Device, place: Place, store: torch.distributed.Store | None) -> Groups:
    """Start torch.distributed and Megatron's process groups, and return those of this rank.

    ``store`` is where the ranks meet; a rank that is alone needs none. A rank that waits in any of the groups for
    COLLECTIVE_TIMEOUT raises RuntimeError.

    Raises TrainerError if Megatron numbers its ranks in another way than ``Place`` does.
    """
    from megatron.core import parallel_state

    sizes, ranks = place.sizes, world_size(place.sizes)
    if store is None:
        if ranks != 1:
            raise TrainerError(f"{ranks} trainer ranks need a store where they meet (trainer.rendezvous)")
        store = torch.distributed.HashStore()
    torch.distributed.init_process_group(
        _backend(device), store=store, rank=place.rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),  # it knows nothing of the default
        # The extra gloo groups serve distributed checkpoints of GPU runs; on CPU every group is gloo already.
        create_gloo_process_groups=device == "cuda",
    )
    found = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    if found != (place.tp, place.cp, place.dp, place.pp, place.ep, place.etp):
        raise TrainerError(f"Megatron's rank layout does not match trainer.parallel: it has {found} for {place}")
    if device == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        # Nothing is initialized at random or dropped out, but Megatron asks for the generators.
        model_parallel_cuda_manual_seed(0)
    of_data = [[rank for rank in range(ranks) if Place.of(sizes, rank).dp == dp] for dp in range(sizes.dp)]
    # All ranks take part in making each.
    model_groups = [torch.distributed.new_group(members, timeout=COLLECTIVE_TIMEOUT) for members in of_data]
    return Groups(
        model=model_groups[place.dp],
        data=parallel_state.get_data_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
    )


def close_distributed() -> None:
    """Undo ``init_distributed``; without it, do nothing."""
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def redirect_cuda_to(device: Device) -> Iterator[None]:
    """Redirect ``device="cuda"`` and ``.cuda()`` in torch calls to ``device``, until the block ends.

    Megatron 0.16.1's schedules name the device as a string (``torch.zeros([], device="cuda")``), and its model moves an
    embedding that two pipeline stages share.
    """
    if device == "cuda":
        yield
        return
    with _RedirectCudaToCPU():
        yield


def layout(device: Device) -> Layout:
    """Return whose modules ``layer_spec`` builds a model of, on which its parameters' names depend.

    They are Transformer Engine's on GPUs where it is installed, else Megatron's own, which are slower there.
    """
    return "transformer_engine" if device == "cuda" and find_spec("transformer_engine") is not None else "local"


def layer_spec(device: Device, config: Any, vp_stage: int | None = None) -> Any:
    """Return the block specification of this rank's decoder layers, or of one virtual pipeline chunk of them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from async_rl.trainer.megatron.attention import LatentAttention, PackedAttention
    from async_rl.trainer.megatron.norm import RMSNorm

    local = layout(device) == "local"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=not local, normalization=config.normalization, vp_stage=vp_stage
    )
    if local:
        # Megatron's own attention refuses packed sequences, its RMSNorm is slow; see the two modules.
        spec.layer_norm = RMSNorm
        for layer in spec.layer_specs:
            parts, attention = layer.submodules, layer.submodules.self_attention.submodules
            parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
            attention.core_attention = PackedAttention
            if config.multi_latent_attention:
                parts.self_attention.module = LatentAttention
                attention.q_layernorm = attention.kv_layernorm = RMSNorm
            elif config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def keep_float32(model: torch.nn.Module) -> None:
    """Convert the routers' expert biases back to float32, which Megatron keeps them in for any parameter type."""
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module._maintain_float32_expert_bias()


def model_overrides(device: Device, *, latent: bool = False) -> dict[str, Any]:
    """Return the settings of TransformerConfig that depend on device and layers; none of them changes results.

    latent: whether the model has latent attention, of which Megatron 0.16.1 fuses the rotary embedding experimentally.
    """
    if layout(device) == "local":
        return {
            "use_cpu_initialization": True,
            # Fused activations use torch.compile, which would need a C++ compiler on every machine.
            "bias_activation_fusion": False,
            "moe_grouped_gemm": False,
        }
    from megatron.core.models.common.embeddings import rope_utils

    return {
        "bias_activation_fusion": True,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        # Without it the host waits for the device twice in each layer, to read the lengths of packed sequences.
        "apply_rope_fusion": device == "cuda" and not latent and rope_utils.fused_apply_rotary_pos_emb_thd is not None,
    }


def optimizer(device: Device, chunks: Sequence[Any], settings: OptimizerSection) -> Optimizer:
    """Return the optimizer for the gradients that ``chunks`` (Megatron's DistributedDataParallel) accumulate.

    On the CPU it is torch's, because Megatron 0.16.1's clipping and distributed optimizer insist on CUDA tensors.
    """
    from async_rl.trainer.megatron import optimizer as optimizers

    kind = optimizers.TorchAdamW if device == "cpu" else optimizers.MegatronAdamW
    return kind(chunks, settings)


def _backend(device: Device) -> str:
    return "gloo" if device == "cpu" else "nccl"


class _RedirectCudaToCPU(TorchFunctionMode):  # type: ignore[misc]  # torch has no types here
    """Turns ``device="cuda"`` arguments of torch functions into ``"cpu"``, and ``.cuda()`` into nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _patch_cuda_calls() -> None:
    """Keep on the CPU what Megatron 0.16.1 puts on torch.cuda.current_device().

    That is gradient buffers, the rotary table and router weights.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Its pipeline schedules wait for their last message; on the CPU it has arrived when the call returns.
    torch.cuda.synchronize = lambda *_: None


def _patch_dispatcher() -> None:
    """Give gloo its counts as lists.

    Megatron 0.16.1's dispatcher of expert parallelism copies them to the CPU on a stream of its own, as NumPy arrays,
    which gloo does not accept.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def counts_as_lists(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits"):
                if isinstance(value := getattr(self, name), torch.Tensor):
                    setattr(self, name, value.tolist())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"  # not None, for which it would make one
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = counts_as_lists


def _patch_pipeline_shapes() -> None:
    """Exchange shapes between pipeline stages in an order that cannot confuse two of them.

    Megatron 0.16.1's stages send the shapes of their tensors in one batch of sends and receives. Two stages of an
    interleaved pipeline are each the other's next and previous, and mistake one shape for the other. Megatron's
    function for the tensors themselves orders the calls so that they cannot.
    """
    from megatron.core.pipeline_parallel import p2p_communication

    def communicate_shapes(self: Any, send_next: Any, send_prev: Any, recv_prev: Any, recv_next: Any) -> Any:
        def shape(tensor: Any = None, *, wanted: bool) -> torch.Tensor | None:
            size = [0, 0, 0] if tensor is None else list(tensor.shape)
            return torch.tensor(size, device=torch.cuda.current_device()) if wanted else None

        received = shape(wanted=recv_prev), shape(wanted=recv_next)
        requests = p2p_communication._p2p_ops(
            tensor_send_prev=shape(send_prev, wanted=send_prev is not None),
            tensor_recv_prev=received[0],
            tensor_send_next=shape(send_next, wanted=send_next is not None),
            tensor_recv_next=received[1],
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        return tuple([0, 0, 0] if one is None else one.tolist() for one in received)

    p2p_communication.P2PCommunicator._communicate_shapes = communicate_shapes


def _patch_transformer_engine() -> None:
    """Have Megatron 0.16.1 do without Transformer Engine, installed or not.

    Its router reads ``te_general_gemm``, which is undefined without it, and with it needs a GPU. Its latent attention
    mistakes the stand-ins for Transformer Engine's classes for the real ones. Its recomputation of a module's output
    asks Transformer Engine for FP8's state unless ``fp8`` is None, and most callers leave it at False.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    multi_latent_attention.HAVE_TE = False
    moe_utils.te_general_gemm = None
    CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def _patch_rng() -> None:
    """Do without the CUDA generators of Megatron 0.16.1.

    It has them for dropout in tensor-parallel regions, and saves and restores them around recomputation. Here is
    neither a GPU nor dropout.
    """
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()

    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None
