"""The model's weights under Hugging Face names, gathered from the ranks that hold their parts, one tensor at a time.

Rank 0 gets the tensors; every rank iterates in step. Memory: on each rank, one Megatron parameter and the parts of it
under way. Knows ``parallel``, ``megatron`` (what a rank holds) and the tables in ``weights.names``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from async_rl.models import names
from async_rl.models.config import ModelConfig, checkpoint_shards
from async_rl.trainer.megatron.model import Held, held
from async_rl.trainer.parallel import Place, expert_rank_of, holder, stage_of

# Size of one *.safetensors file: what transformers writes too.
SHARD_BYTES = 5 * 10**9


class Weights:
    """The live weights of a model that is spread over ranks; making one is a collective of all of them.

    Tensors that rank 0 holds whole are views of the parameters where Megatron's layout allows: a consumer must be done
    with them before the next optimizer step.
    """

    def __init__(self, chunks: Sequence[Any], model: ModelConfig, place: Place, layout: names.Layout) -> None:
        self._model = model
        self._place = place
        self._entries = list(names.entries(model, layout))
        # Of an embedding that the last stage has a copy of, the first is exported.
        self._held: dict[str, Held] = {}
        for one in held(chunks, model, place, layout):
            self._held.setdefault(one.entry.hf[0], one)
        self._metadata = self._agree_on_metadata()

    def metadata(self) -> list[names.Meta]:
        """Name, dtype and shape of everything that iteration yields, in the same order."""
        return [meta for entry in self._entries for meta in self._metadata[entry.hf[0]]]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, tensor) on rank 0, (name, None) elsewhere."""
        for entry in self._entries:
            tensors = self._gathered(entry)
            for index, name in enumerate(entry.hf):
                yield name, None if tensors is None else tensors[index]

    def _gathered(self, entry: names.Entry) -> list[torch.Tensor] | None:
        """The whole Hugging Face tensors of an entry on rank 0."""
        one = self._held.get(entry.hf[0])
        source = self._source(entry)
        whole = None
        # The first of the ranks that hold the same join their parts; the others have nothing to do.
        if one is not None and source <= self._place.rank < source + one.parts:
            whole = self._joined(one)
        if source == 0:
            return whole if self._place.rank == 0 else None
        if self._place.rank == source:
            assert whole is not None
            for tensor in whole:
                torch.distributed.send(tensor.contiguous(), dst=0)
        if self._place.rank != 0:
            return None
        # Where rank 0 computes is where the other ranks do.
        device = next(iter(self._held.values())).tensor.device
        received = [torch.empty(meta.shape, dtype=meta.dtype, device=device) for meta in self._metadata[entry.hf[0]]]
        for tensor in received:
            torch.distributed.recv(tensor, src=source)
        return received

    def _joined(self, one: Held) -> list[torch.Tensor]:
        parts = names.to_hf(self._model, one.entry.kind, one.tensor.detach())
        if one.parts == 1 or one.entry.cut == "whole":
            return parts
        dense = one.entry.expert is None
        group = (
            parallel_state.get_tensor_model_parallel_group()
            if dense
            else parallel_state.get_expert_tensor_parallel_group()
        )
        result = []
        for part in parts:
            pieces = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(one.parts)]
            torch.distributed.all_gather(pieces, part.contiguous(), group=group)
            result.append(names.join(one.entry, pieces))
        return result

    def _source(self, entry: names.Entry) -> int:
        """The rank that has an entry, or its first part."""
        sizes, model = self._place.sizes, self._model
        if entry.layer < 0:
            return 0
        if entry.layer == model.num_layers:
            return holder(sizes, sizes.pp - 1, None)
        stage, _, _ = stage_of(model.num_layers, sizes, entry.layer)
        if entry.expert is None:
            return holder(sizes, stage, None)
        expert_rank, _ = expert_rank_of(model.num_experts, sizes, entry.expert)
        return holder(sizes, stage, expert_rank)

    def _agree_on_metadata(self) -> dict[str, list[names.Meta]]:
        """What there is on any rank, by the first name of each entry."""
        mine = {}
        for name, one in self._held.items():
            shapes = names.hf_shapes(self._model, one.entry, one.tensor.shape, one.parts)
            mine[name] = [
                names.Meta(hf, one.tensor.dtype, shape) for hf, shape in zip(one.entry.hf, shapes, strict=True)
            ]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        return {name: metas for part in everyone for name, metas in part.items()}


def write_hf(weights: Weights, folder: Path, *, like: Path, model: ModelConfig, place: Place) -> None:
    """Write ``weights`` as a checkpoint folder like ``like``: its config and tokenizer files, and of its weights those
    of layers that predict further tokens, which are not trained. Rank 0 writes; every rank calls it."""
    if place.rank == 0:
        extra = names.extra_layers(model, checkpoint_shards(like))
        names.write_checkpoint(chain(weights, extra), folder, shard_bytes=SHARD_BYTES)
        for file in like.iterdir():
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copy2(file, folder / file.name)
    else:
        for _ in weights:  # gathering a parameter is a collective: take part in it
            pass
    torch.distributed.barrier()
