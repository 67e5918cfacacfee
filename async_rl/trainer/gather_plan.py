"""Plans how the parts of a model's parameters come to one rank: which ranks send them, and in which exchanges.

That is rank 0 for all parameters, for those of each pipeline stage its first rank, or for those of each file that is
written the ranks in turns. Every rank makes the same plan.
An exchange takes consecutive parameters, whatever layers and experts they belong to, so that there are as many
exchanges as the model's bytes fill, not as it has tensors. In it each rank sends what it has as one message:

    ranks        | 1                    | 2                    |
    parameters   |  e0 e1 e2 (fc1, fc2) |  e3 e4 e5 (fc1, fc2) |      each at a multiple of ALIGNMENT bytes

Knows the tables in ``models.names`` and the numbering of ranks in ``parallel``; knows neither Megatron nor process
groups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from async_rl.config.training import ParallelSection
from async_rl.models import names
from async_rl.models.config import ModelConfig
from async_rl.trainer.parallel import expert_rank_of, owning_rank, stage_of

# In a message every part begins at a multiple of this, so that it can be viewed as its dtype: the widest load of a GPU.
ALIGNMENT = 16


def stage_of_entry(model: ModelConfig, sizes: ParallelSection, entry: names.Entry) -> int:
    """Return the pipeline stage whose part of a parameter is taken."""
    if entry.layer < 0:
        return 0  # where the last stage has a copy of the embedding, the first stage's is taken
    return sizes.pp - 1 if entry.layer == model.num_layers else stage_of(model.num_layers, sizes, entry.layer)[0]


def holders(model: ModelConfig, sizes: ParallelSection, entry: names.Entry) -> range:
    """Return the ranks whose parts make a parameter, in the order of the parts.

    Further ranks have the same parts (data and context parallelism, the remaining ranks of an expert layer, and for
    a parameter that is not cut the other tensor-parallel ranks): they send nothing.
    """
    stage = stage_of_entry(model, sizes, entry)
    if entry.expert is None:
        first, parts = owning_rank(sizes, stage, None), sizes.tp
    else:
        expert_rank, _ = expert_rank_of(model.num_experts, sizes, entry.expert)
        first, parts = owning_rank(sizes, stage, expert_rank), sizes.etp
    return range(first, first + (1 if entry.cut == "whole" else parts))


@dataclass(frozen=True, slots=True)
class Parameter:
    """One Megatron parameter, and the ranks that have it."""

    entry: names.Entry
    dtype: torch.dtype
    shape: tuple[int, ...]
    """The shape of each part."""
    holders: range
    destination: int = 0
    """The rank that needs all of it."""

    @property
    def nbytes(self) -> int:
        """Bytes of each part."""
        size: int = self.dtype.itemsize
        return math.prod(self.shape) * size

    @property
    def whole_bytes(self) -> int:
        """Bytes of all parts."""
        return self.nbytes * len(self.holders)

    @property
    def from_others(self) -> int:
        """Bytes that the destination receives."""
        return self.nbytes * sum(1 for rank in self.holders if rank != self.destination)


class Exchange:
    """Consecutive parameters whose parts come to one rank together."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = list(parameters)
        self.destination = self.parameters[0].destination
        self.nbytes: Mapping[int, int] = self._sizes()
        """The size of the message of each rank that sends one, by rank."""

    def places(self) -> Iterator[tuple[Parameter, dict[int, int]]]:
        """Yield each parameter with the position of its part in the message of each rank that sends one."""
        filled: Counter[int] = Counter()
        for parameter in self.parameters:
            places = {rank: filled[rank] for rank in parameter.holders if rank != self.destination}
            yield parameter, places
            for rank in places:
                filled[rank] += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT

    def _sizes(self) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for parameter, places in self.places():
            sizes |= {rank: place + parameter.nbytes for rank, place in places.items()}
        return sizes


def in_files(parameters: Iterable[Parameter], file_bytes: int, ranks: int) -> list[list[Parameter]]:
    """Return the parameters of each file, in their order, with the rank that writes it as their destination.

    A file has at most ``file_bytes``, or a single parameter. The ranks take files in turns.
    """
    files: list[list[Parameter]] = []
    size = 0
    for parameter in parameters:
        if not files or size + parameter.whole_bytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(replace(parameter, destination=(len(files) - 1) % ranks))
        size += parameter.whole_bytes
    return files


def exchanges(parameters: Iterable[Parameter], bucket_bytes: int) -> Iterator[Exchange]:
    """Yield exchanges of all parameters, in their order, in each of which one rank receives at most ``bucket_bytes``.

    A parameter that is larger has an exchange of its own. What the destination has itself counts nothing.
    """
    taken: list[Parameter] = []
    received = 0
    for parameter in parameters:
        full = received and received + parameter.from_others > bucket_bytes
        if full or (taken and taken[0].destination != parameter.destination):
            yield Exchange(taken)
            taken, received = [], 0
        taken.append(parameter)
        received += parameter.from_others
    if taken:
        yield Exchange(taken)
