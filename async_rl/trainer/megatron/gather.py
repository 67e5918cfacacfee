"""Gathers the model's weights under Hugging Face names on rank 0, from the ranks that hold their parts.

The parts of many parameters come in one message from each rank that has some (``gather_plan``), and each byte travels
once: from the first of the ranks that hold it, straight to rank 0. Every rank iterates in step. Memory beside the
parameters: on rank 0 what one exchange brings, and the whole tensors of the parameter that is being yielded; on a rank
that sends, its message. Knows ``gather_plan``, ``model`` (which tensors a rank holds) and the tables in
``models.names``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from async_rl.models import names
from async_rl.models.config import ModelConfig
from async_rl.trainer.gather_plan import Exchange, Parameter, exchanges, holders
from async_rl.trainer.megatron.model import LocalTensor, local_tensors
from async_rl.trainer.parallel import Place


class GatheredWeights:
    """The live weights of a model that is spread over ranks. All ranks make one together, and iterate it together.

    Tensors that rank 0 holds whole are views of the parameters where Megatron's layout allows: a consumer must be done
    with them before the next optimizer step. Others are views of what one exchange brought: a consumer that keeps one
    keeps all of that.
    """

    def __init__(
        self, chunks: Sequence[Any], model: ModelConfig, place: Place, layout: names.Layout, bucket_bytes: int
    ) -> None:
        self._model = model
        self._place = place
        # Where the last stage has a copy of the embedding, the first stage's is exported.
        self._local: dict[str, LocalTensor] = {}
        for one in local_tensors(chunks, model, place, layout):
            self._local.setdefault(one.entry.hf[0], one)
        self._parameters = self._agree_on_parameters(layout)
        self._exchanges = list(exchanges(self._parameters, bucket_bytes))

    def metadata(self) -> list[names.Meta]:
        """Return name, dtype and shape of every tensor that iteration yields, in the same order."""
        return [
            names.Meta(name, parameter.dtype, shape)
            for parameter in self._parameters
            for name, shape in zip(parameter.entry.hf, self._shapes(parameter), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield (name, tensor) on rank 0, (name, None) elsewhere."""
        for exchange in self._exchanges:
            messages = self._exchanged(exchange)
            for parameter, places in exchange.places():
                if self._place.rank != 0:
                    yield from ((name, None) for name in parameter.entry.hf)
                    continue
                parts = [self._part(parameter, messages, places, rank) for rank in parameter.holders]
                yield from zip(parameter.entry.hf, self._whole(parameter.entry, parts), strict=True)

    def _exchanged(self, exchange: Exchange) -> dict[int, torch.Tensor]:
        """Send this rank's parts to rank 0, which returns the message of each other rank, uint8[bytes]."""
        rank = self._place.rank
        if rank == 0:
            messages = {source: self._message(nbytes) for source, nbytes in exchange.nbytes.items()}
            calls = [
                torch.distributed.P2POp(torch.distributed.irecv, message, source)
                for source, message in messages.items()
            ]
        elif rank in exchange.nbytes:
            messages = {}
            calls = [torch.distributed.P2POp(torch.distributed.isend, self._packed(exchange), 0)]
        else:
            return {}
        # As one batch, NCCL uses the communicator of all ranks: for calls by themselves it makes one for each pair.
        for call in torch.distributed.batch_isend_irecv(calls) if calls else ():
            call.wait()
        return messages

    def _packed(self, exchange: Exchange) -> torch.Tensor:
        """Return this rank's message."""
        message = self._message(exchange.nbytes[self._place.rank])
        for parameter, places in exchange.places():
            if self._place.rank in places:
                _view(message, places[self._place.rank], parameter).copy_(self._own(parameter))
        return message

    def _part(
        self, parameter: Parameter, messages: Mapping[int, torch.Tensor], places: Mapping[int, int], rank: int
    ) -> torch.Tensor:
        """Return a rank's part of a parameter, on rank 0."""
        return self._own(parameter) if rank == 0 else _view(messages[rank], places[rank], parameter)

    def _own(self, parameter: Parameter) -> torch.Tensor:
        return self._local[parameter.entry.hf[0]].tensor.detach()

    def _whole(self, entry: names.Entry, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the whole Hugging Face tensors of a parameter, whose parts these are."""
        pieces = [names.to_hf(self._model, entry.kind, part) for part in parts]
        return [names.join(entry, of_tensor) for of_tensor in zip(*pieces, strict=True)]

    def _message(self, nbytes: int) -> torch.Tensor:
        # All ranks compute on the same kind of device.
        device = next(iter(self._local.values())).tensor.device
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def _shapes(self, parameter: Parameter) -> list[tuple[int, ...]]:
        parts = len(parameter.holders)
        return names.hf_shapes(self._model, parameter.entry, parameter.shape, parts)

    def _agree_on_parameters(self, layout: names.Layout) -> list[Parameter]:
        """Return the model's parameters in the order of export. Each is described by the first rank that has it."""
        entries = [
            (entry, holders(self._model, self._place.sizes, entry)) for entry in names.entries(self._model, layout)
        ]
        mine = {}
        for entry, ranks in entries:
            if ranks[0] == self._place.rank:
                tensor = self._local[entry.hf[0]].tensor
                mine[entry.hf[0]] = tensor.dtype, tuple(tensor.shape)
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, mine)
        found = {name: one for of_rank in of_ranks for name, one in of_rank.items()}
        described = ((one, found[one[0].hf[0]]) for one in entries)
        return [Parameter(entry, dtype, shape, ranks) for (entry, ranks), (dtype, shape) in described]


def _view(message: torch.Tensor, place: int, parameter: Parameter) -> torch.Tensor:
    """Return the part of a parameter at ``place`` of a message."""
    return message[place : place + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
