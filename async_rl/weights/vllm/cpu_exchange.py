"""A completion of vLLM 0.30: on CPUs its data-parallel ranks have no way to exchange tokens with each other's experts.

Experts are spread over all ranks of an engine, and each rank computes other sequences: before the experts all ranks get
the tokens of all, after them each gets the sums of its own. On GPUs NCCL does both, for ranks that have unlike numbers
of tokens. On CPUs vLLM leaves both methods unwritten. Here they are, over Gloo. The test
``test_vllm_still_has_no_exchange_between_experts_on_cpus`` fails once vLLM has them, and then this file can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed


def exchange_on_cpus() -> None:
    """Give vLLM's communicator on CPUs what it lacks. Idempotent."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv


def all_gatherv(
    communicator: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Return the rows of all ranks, in the order of ranks; ``sizes`` has how many rows each has, by default as many."""
    if isinstance(input_, list):
        return [all_gatherv(communicator, each, dim, sizes) for each in input_]
    assert dim == 0, "vLLM gathers rows"
    sizes = sizes or [len(input_)] * communicator.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))  # Gloo gathers parts of one size
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded, group=communicator.device_group)
    return torch.cat([part[:rows] for part, rows in zip(parts, sizes, strict=True)])


def reduce_scatterv(
    communicator: Any, input_: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Return this rank's rows of the sum over all ranks; ``sizes`` has how many rows each gets."""
    assert dim == 0, "vLLM scatters rows"
    sizes = sizes or [len(input_) // communicator.world_size] * communicator.world_size
    total = input_.contiguous().clone()
    distributed.all_reduce(total, group=communicator.device_group)
    start = sum(sizes[: communicator.rank_in_group])
    return total[start : start + sizes[communicator.rank_in_group]].clone()
