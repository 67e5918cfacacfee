"""Gathers weights one Hugging Face tensor at a time, as the trainer did before: what packed gathering must yield.

Ranks that cut a tensor gather its parts among them, and the first of them sends the whole to rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from async_rl.config.training import ParallelSection
from async_rl.models import names
from async_rl.models.config import ModelConfig
from async_rl.trainer.megatron.model import LocalTensor, local_tensors
from async_rl.trainer.parallel import Place, expert_rank_of, owning_rank, stage_of

Group = torch.distributed.ProcessGroup


class TensorGather:
    """Yields (name, tensor) on rank 0, (name, None) elsewhere. All ranks iterate together.

    ``tensor`` and ``expert_tensor`` are the groups of the ranks with other parts of this rank's dense parameters, and
    of its experts.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        model: ModelConfig,
        place: Place,
        layout: names.Layout,
        tensor: Group,
        expert_tensor: Group,
    ) -> None:
        self._model, self._place, self._tensor, self._expert_tensor = model, place, tensor, expert_tensor
        self._entries = list(names.entries(model, layout))
        self._local: dict[str, LocalTensor] = {}
        for one in local_tensors(chunks, model, place, layout):
            self._local.setdefault(one.entry.hf[0], one)
        mine = {
            name: [
                names.Meta(hf, one.tensor.dtype, shape)
                for hf, shape in zip(
                    one.entry.hf, names.hf_shapes(model, one.entry, one.tensor.shape, one.parts), strict=True
                )
            ]
            for name, one in self._local.items()
        }
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, mine)
        self._metadata = {name: metas for of_rank in of_ranks for name, metas in of_rank.items()}

    def metadata(self) -> list[names.Meta]:
        return [meta for entry in self._entries for meta in self._metadata[entry.hf[0]]]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for entry in self._entries:
            tensors = self._gathered(entry)
            for index, name in enumerate(entry.hf):
                yield name, None if tensors is None else tensors[index]

    def _gathered(self, entry: names.Entry) -> list[torch.Tensor] | None:
        one, rank = self._local.get(entry.hf[0]), self._place.rank
        source = first_holder(self._model, self._place.sizes, entry)
        whole = self._joined(one) if one is not None and source <= rank < source + one.parts else None
        if source == 0:
            return whole if rank == 0 else None
        if rank == source:
            for tensor in whole or ():
                torch.distributed.send(tensor.contiguous(), dst=0)
        if rank != 0:
            return None
        received = [torch.empty(meta.shape, dtype=meta.dtype) for meta in self._metadata[entry.hf[0]]]
        for tensor in received:
            torch.distributed.recv(tensor, src=source)
        return received

    def _joined(self, one: LocalTensor) -> list[torch.Tensor]:
        parts = names.to_hf(self._model, one.entry.kind, one.tensor.detach())
        if one.parts == 1 or one.entry.cut == "whole":
            return parts
        group = self._tensor if one.entry.expert is None else self._expert_tensor
        result = []
        for part in parts:
            pieces = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(one.parts)]
            torch.distributed.all_gather(pieces, part.contiguous(), group=group)
            result.append(names.join(one.entry, pieces))
        return result


def first_holder(model: ModelConfig, sizes: ParallelSection, entry: names.Entry) -> int:
    """Return the rank that has an entry, or its first part."""
    if entry.layer < 0:
        return 0
    if entry.layer == model.num_layers:
        return owning_rank(sizes, sizes.pp - 1, None)
    stage, _, _ = stage_of(model.num_layers, sizes, entry.layer)
    if entry.expert is None:
        return owning_rank(sizes, stage, None)
    return owning_rank(sizes, stage, expert_rank_of(model.num_experts, sizes, entry.expert)[0])
