"""Builds this rank's part of a Megatron GPTModel from a Hugging Face checkpoint folder.

Knows Megatron, the names in ``models.names`` and the device seam; knows nothing of Ray, vLLM or the loss. Call
``platform.activate`` and ``platform.init_distributed`` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors import safe_open

from async_rl.config.schema import RunConfig
from async_rl.errors import ModelError
from async_rl.models import names
from async_rl.models.config import ModelConfig, checkpoint_shards
from async_rl.models.headers import PLAIN, listed
from async_rl.trainer.megatron import platform
from async_rl.trainer.megatron.arguments import ddp_config, transformer_config
from async_rl.trainer.megatron.platform import Device
from async_rl.trainer.parallel import Place, expert_rank_of, stage_of

log = structlog.get_logger(__name__)


def build(config: RunConfig, model: ModelConfig, device: Device, place: Place) -> list[DistributedDataParallel]:
    """Build this rank's part of the model with the checkpoint's weights.

    Returns one module per virtual pipeline chunk, each wrapped for gradient accumulation and data parallelism.
    """
    settings, reduction = transformer_config(config, model, device), ddp_config(config, device)
    sizes = place.sizes
    chunks = []
    for chunk in range(sizes.vpp):
        stage = chunk if sizes.vpp > 1 else None
        with platform.redirect_cuda_to(device):
            gpt = GPTModel(
                config=settings,
                transformer_layer_spec=platform.layer_spec(device, settings, stage),
                vocab_size=model.vocab_size,
                max_sequence_length=model.max_position_embeddings,
                pre_process=place.pp == 0 and chunk == 0,
                post_process=place.is_last_stage and chunk == sizes.vpp - 1,
                # Latent attention applies its rotary embedding itself.
                position_embedding_type="rope" if model.latent is None else "none",
                rotary_percent=model.rotary_fraction,
                rotary_base=model.rope_theta,  # annotated int, used as a float
                share_embeddings_and_output_weights=model.tie_word_embeddings,
                vp_stage=stage,
            )
        gpt.to(device=device, dtype=settings.params_dtype)
        platform.keep_float32(gpt)
        chunks.append(gpt)
    here = local_tensors(chunks, model, place, platform.layout(device))
    load_checkpoint(here, config.model.path, model, platform.layout(device))
    _mark(here)
    return [
        DistributedDataParallel(
            settings,
            reduction,
            gpt,
            # Megatron's own choice for the chunks after the first: the step does not wait for their reduction.
            disable_bucketing=chunk > 0,
        )
        for chunk, gpt in enumerate(chunks)
    ]


def _mark(here: Sequence[LocalTensor]) -> None:
    """Mark the kind of each parameter for Megatron's gradient reduction and norm, where its modules do not.

    Megatron 0.16.1 sets the first two only where it initializes parameters itself. Transformer Engine 2.11.0 marks all
    linear layers as cut, and so the down-projections of latent attention, which every tensor-parallel rank has whole:
    each rank would add their gradient to the norm. Megatron takes experts that are not spread over ranks (ep 1) for
    dense parameters, whose gradients every tensor-parallel rank has whole; but it gives each of these ranks tokens of
    its own unless etp is tp.
    """
    for one in here:
        one.tensor.tensor_model_parallel = one.entry.cut != "whole"
        if one.entry.cut != "whole":
            one.tensor.partition_dim = names.AXIS[one.entry.cut]
        if one.entry.expert is not None:
            one.tensor.allreduce = False


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor of the model that this rank has, or a part of it."""

    entry: names.Entry
    """Its names in Megatron and in the checkpoint."""
    tensor: torch.Tensor
    """This rank's part, or the whole tensor."""
    part: int
    """The number of this rank's part, from 0."""
    parts: int
    """How many parts there are: 1 where each rank has it whole."""


def local_tensors(chunks: Sequence[Any], model: ModelConfig, place: Place, layout: names.Layout) -> list[LocalTensor]:
    """Return this rank's tensors in the order of the tables in ``models.names``.

    Raises ModelError where a chunk lacks a tensor of the tables, or has one that is not in them.
    """
    named = [dict(_tensors(chunk)) for chunk in chunks]
    missing, used = [], set()
    result = []
    for entry in names.entries(model, layout):
        for chunk, name in _where(entry, model, place):
            if name not in named[chunk]:
                missing.append(name)
                continue
            used.add((chunk, name))
            part, parts = (place.tp, place.sizes.tp) if entry.expert is None else (place.etp, place.sizes.etp)
            result.append(LocalTensor(entry, named[chunk][name], part, parts))
    unknown = [name for chunk, tensors in enumerate(named) for name in tensors if (chunk, name) not in used]
    if missing or unknown:
        raise ModelError(
            f"{model.architecture}: the name table and the built model differ: the model lacks {missing[:5]}, "
            f"the table {unknown[:5]}"
        )
    return result


def _tensors(chunk: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from chunk.named_parameters()
    for name, buffer in chunk.named_buffers():
        if name.endswith("router.expert_bias"):
            yield name, buffer


def _where(entry: names.Entry, model: ModelConfig, place: Place) -> Iterator[tuple[int, str]]:
    """Yield (chunk of this rank, name in it) for each tensor that an entry is loaded into; none if it is elsewhere."""
    sizes = place.sizes
    last_chunk = sizes.vpp - 1
    if entry.layer < 0:
        if place.pp == 0:
            yield 0, entry.name()
        if model.tie_word_embeddings and sizes.pp > 1 and place.is_last_stage:
            yield last_chunk, "output_layer.weight"  # the last stage's copy, kept equal by Megatron
    elif entry.layer == model.num_layers:
        if place.is_last_stage:
            yield last_chunk, entry.name()
    else:
        stage, chunk, layer = stage_of(model.num_layers, sizes, entry.layer)
        if stage != place.pp:
            return
        if entry.expert is None:
            yield chunk, entry.name(layer)
            return
        expert_rank, expert = expert_rank_of(model.num_experts, sizes, entry.expert)
        if expert_rank == place.ep:
            yield chunk, entry.name(layer, expert)


def load_checkpoint(here: Sequence[LocalTensor], path: Path, model: ModelConfig, layout: names.Layout) -> None:
    """Fill this rank's tensors from the folder's safetensors, one parameter at a time, reading nothing else.

    Raises ModelError that names the tensors which are missing, surplus, quantized, or of another shape than config.json
    says.
    """
    shards: list[Any] = [safe_open(shard, framework="pt") for shard in checkpoint_shards(path)]
    where = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118  # not a dict
    faults = _faults(model, here, {name for entry in names.entries(model, layout) for name in entry.hf}, where)
    if faults:
        raise ModelError(f"model.path {path}: weights do not fit config.json: {listed(faults)}")
    with torch.no_grad():
        for one in here:
            tensors = [
                names.part(one.entry, where[name].get_tensor(name), one.part, one.parts) for name in one.entry.hf
            ]
            one.tensor.copy_(names.to_megatron(model, one.entry.kind, tensors))
    log.info("weights_loaded", tensors=len(here), path=str(path))


def _faults(model: ModelConfig, here: Sequence[LocalTensor], known: set[str], where: dict[str, Any]) -> list[str]:
    faults = []
    for one in here:
        shapes = names.hf_shapes(model, one.entry, one.tensor.shape, one.parts)
        for name, shape in zip(one.entry.hf, shapes, strict=True):
            if name not in where:
                faults.append(f"{name} is missing")
            elif tuple(where[name].get_slice(name).get_shape()) != shape:
                faults.append(f"{name} is {where[name].get_slice(name).get_shape()}, expected {list(shape)}")
            elif (dtype := where[name].get_slice(name).get_dtype()) not in PLAIN:
                faults.append(f"{name} is {dtype}, expected one of {', '.join(PLAIN)}")
    faults += [f"{name} is surplus" for name in where if name not in known and not names.ignored(model, name)]
    return faults


def packed_seq_params(cu_seqlens: torch.Tensor, longest: int) -> PackedSeqParams:
    """Describe sequences that are packed back to back to Megatron; cu_seqlens int32[S + 1]."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
