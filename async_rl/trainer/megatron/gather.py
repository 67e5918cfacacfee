"""Gathers the model's weights under Hugging Face names from the ranks that hold their parts, one tensor at a time.

Rank 0 gets the tensors; every rank iterates in step. Memory: on each rank, one Megatron parameter and those of its
parts that are in transfer. Knows ``parallel``, ``model`` (which tensors a rank holds) and the tables in
``models.names``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from async_rl.models import names
from async_rl.models.config import ModelConfig
from async_rl.trainer.megatron.model import LocalTensor, local_tensors
from async_rl.trainer.megatron.platform import Groups
from async_rl.trainer.parallel import Place, expert_rank_of, owning_rank, stage_of


class GatheredWeights:
    """The live weights of a model that is spread over ranks. All ranks make one together, and iterate it together.

    Tensors that rank 0 holds whole are views of the parameters where Megatron's layout allows: a consumer must be done
    with them before the next optimizer step.
    """

    def __init__(
        self, chunks: Sequence[Any], model: ModelConfig, place: Place, groups: Groups, layout: names.Layout
    ) -> None:
        self._model = model
        self._place = place
        self._groups = groups
        self._entries = list(names.entries(model, layout))
        # Where the last stage has a copy of the embedding, the first stage's is exported.
        self._local: dict[str, LocalTensor] = {}
        for one in local_tensors(chunks, model, place, layout):
            self._local.setdefault(one.entry.hf[0], one)
        self._metadata = self._agree_on_metadata()

    def metadata(self) -> list[names.Meta]:
        """Return name, dtype and shape of every tensor that iteration yields, in the same order."""
        return [meta for entry in self._entries for meta in self._metadata[entry.hf[0]]]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield (name, tensor) on rank 0, (name, None) elsewhere."""
        for entry in self._entries:
            tensors = self._gathered(entry)
            for index, name in enumerate(entry.hf):
                yield name, None if tensors is None else tensors[index]

    def _gathered(self, entry: names.Entry) -> list[torch.Tensor] | None:
        """Return the whole Hugging Face tensors of an entry on rank 0, None elsewhere."""
        one = self._local.get(entry.hf[0])
        source = self._source(entry)
        whole = None
        # Several sets of ranks may hold the parts of the same tensor: the first set joins them.
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
        # All ranks compute on the same kind of device.
        device = next(iter(self._local.values())).tensor.device
        received = [torch.empty(meta.shape, dtype=meta.dtype, device=device) for meta in self._metadata[entry.hf[0]]]
        for tensor in received:
            torch.distributed.recv(tensor, src=source)
        return received

    def _joined(self, one: LocalTensor) -> list[torch.Tensor]:
        parts = names.to_hf(self._model, one.entry.kind, one.tensor.detach())
        if one.parts == 1 or one.entry.cut == "whole":
            return parts
        group = self._groups.tensor if one.entry.expert is None else self._groups.expert_tensor
        result = []
        for part in parts:
            pieces = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(one.parts)]
            torch.distributed.all_gather(pieces, part.contiguous(), group=group)
            result.append(names.join(one.entry, pieces))
        return result

    def _source(self, entry: names.Entry) -> int:
        """Return the rank that has an entry, or its first part."""
        sizes, model = self._place.sizes, self._model
        if entry.layer < 0:
            return 0
        if entry.layer == model.num_layers:
            return owning_rank(sizes, sizes.pp - 1, None)
        stage, _, _ = stage_of(model.num_layers, sizes, entry.layer)
        if entry.expert is None:
            return owning_rank(sizes, stage, None)
        expert_rank, _ = expert_rank_of(model.num_experts, sizes, entry.expert)
        return owning_rank(sizes, stage, expert_rank)

    def _agree_on_metadata(self) -> dict[str, list[names.Meta]]:
        """Return the metadata of all ranks' tensors, by the first name of each entry."""
        mine = {}
        for name, one in self._local.items():
            shapes = names.hf_shapes(self._model, one.entry, one.tensor.shape, one.parts)
            mine[name] = [
                names.Meta(hf, one.tensor.dtype, shape) for hf, shape in zip(one.entry.hf, shapes, strict=True)
            ]
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, mine)
        return {name: metas for metas_of in of_ranks for name, metas in metas_of.items()}
