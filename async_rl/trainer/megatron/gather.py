"""Gathers the model's weights under Hugging Face names on rank 0, from the ranks that hold their parts.

Or those of each pipeline stage on its first rank, or those of each file of an export on the rank that writes it. The
parts of many parameters come in one message from each rank that has some (``gather_plan``), and each byte travels once:
from the first of the ranks that hold it, straight to where it is needed. Every rank iterates in step. Memory beside the
parameters: on a rank that gathers what one exchange brings, and the whole tensors of the parameter that is being
yielded; on a rank that sends, its message. Knows ``gather_plan``, ``model`` (which tensors a rank holds) and the tables
in ``models.names``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from async_rl.models import names
from async_rl.models.config import ModelConfig
from async_rl.trainer.gather_plan import Exchange, Parameter, exchanges, holders, in_files, stage_of_entry
from async_rl.trainer.megatron.model import LocalTensor, local_tensors
from async_rl.trainer.parallel import Place, owning_rank


class GatheredWeights:
    """The live weights of a model that is spread over ranks. All ranks make one together, and iterate it together.

    With ``by_stage`` each rank has the weights of its own pipeline stage alone, and the stages do not wait for each
    other. With ``file_bytes`` the first ``writers`` ranks, or all, get the weights of one file each, in turns.

    Tensors that rank 0 holds whole are views of the parameters where Megatron's layout allows: a consumer must be done
    with them before the next optimizer step. Others are views of what one exchange brought: a consumer that keeps one
    keeps all of that.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        model: ModelConfig,
        place: Place,
        layout: names.Layout,
        bucket_bytes: int,
        *,
        by_stage: bool = False,
        file_bytes: int | None = None,
        writers: int | None = None,
    ) -> None:
        self._model = model
        self._place = place
        self._by_stage = by_stage
        self._destination = owning_rank(place.sizes, place.pp, None) if by_stage else 0
        # Where the last stage has a copy of the embedding, the first stage's is exported.
        self._local: dict[str, LocalTensor] = {}
        for one in local_tensors(chunks, model, place, layout):
            self._local.setdefault(one.entry.hf[0], one)
        self._parameters = self._agree_on_parameters(layout)
        self._files: list[list[Parameter]] = []
        if file_bytes is not None:
            self._files = in_files(self._parameters, file_bytes, writers or torch.distributed.get_world_size())
            self._parameters = [parameter for file in self._files for parameter in file]
        every = exchanges(self._parameters, bucket_bytes)
        # A file's weights come to one rank after the other; those of stages, to several at one time.
        self._exchanges = [each for each in every if self._files or each.destination == self._destination]

    def metadata(self) -> list[names.Meta]:
        """Return name, dtype and shape of every tensor that iteration yields, in the same order."""
        if self._files:
            return [meta for _, metas in self.files() for meta in metas]
        return self.by_destination()[self._destination]

    def files(self) -> list[tuple[int, list[names.Meta]]]:
        """Return the rank that gets the tensors of each file, and these; iteration yields them file by file."""
        return [
            (file[0].destination, [meta for parameter in file for meta in self._metas(parameter)])
            for file in self._files
        ]

    def by_destination(self) -> dict[int, list[names.Meta]]:
        """Return the metadata of the tensors that each rank gets which gets any, in the order of ranks."""
        found: dict[int, list[names.Meta]] = {}
        for parameter in self._parameters:
            found.setdefault(parameter.destination, []).extend(self._metas(parameter))
        return found

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield (name, tensor) on the rank that gathers, (name, None) elsewhere."""
        for exchange in self._exchanges:
            gathers = self._place.rank == exchange.destination
            messages = self._exchanged(exchange)
            for parameter, places in exchange.places():
                if not gathers:
                    yield from ((name, None) for name in parameter.entry.hf)
                    continue
                parts = [self._part(parameter, messages, places, rank) for rank in parameter.holders]
                yield from zip(parameter.entry.hf, self._whole(parameter.entry, parts), strict=True)

    def _exchanged(self, exchange: Exchange) -> dict[int, torch.Tensor]:
        """Send this rank's parts to the rank that gathers, which returns the message of each other, uint8[bytes]."""
        rank = self._place.rank
        if rank == exchange.destination:
            messages = {source: self._message(nbytes) for source, nbytes in exchange.nbytes.items()}
            calls = [
                torch.distributed.P2POp(torch.distributed.irecv, message, source)
                for source, message in messages.items()
            ]
        elif rank in exchange.nbytes:
            messages = {}
            calls = [torch.distributed.P2POp(torch.distributed.isend, self._packed(exchange), exchange.destination)]
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
        """Return a rank's part of a parameter, on the rank that gathers."""
        return self._own(parameter) if rank == self._place.rank else _view(messages[rank], places[rank], parameter)

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

    def _metas(self, parameter: Parameter) -> list[names.Meta]:
        shapes = names.hf_shapes(self._model, parameter.entry, parameter.shape, len(parameter.holders))
        return [
            names.Meta(name, parameter.dtype, shape) for name, shape in zip(parameter.entry.hf, shapes, strict=True)
        ]

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
        parameters = [
            Parameter(entry, dtype, shape, ranks, self._destination_of(entry))
            for (entry, ranks), (dtype, shape) in described
        ]
        return sorted(parameters, key=lambda parameter: parameter.destination)  # the layers of a stage together

    def _destination_of(self, entry: names.Entry) -> int:
        if not self._by_stage:
            return 0
        return owning_rank(self._place.sizes, stage_of_entry(self._model, self._place.sizes, entry), None)


def _view(message: torch.Tensor, place: int, parameter: Parameter) -> torch.Tensor:
    """Return the part of a parameter at ``place`` of a message."""
    return message[place : place + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
