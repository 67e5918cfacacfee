"""Adds up and compares single numbers over the trainer's ranks. Knows the process groups alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from async_rl.trainer.megatron.platform import Device, Groups


class Collectives:
    """Exchanges numbers with other ranks. All of them make the same calls in the same order."""

    def __init__(self, groups: Groups, device: Device) -> None:
        self._groups = groups
        self._device = device

    def sum_over_data(self, **values: float) -> dict[str, float]:
        """Sum values over the data-parallel ranks, exact for counts below 2**53."""
        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(flat, group=self._groups.data)
        return dict(zip(values, flat.tolist(), strict=True))

    def largest(self, value: float, group: torch.distributed.ProcessGroup | None = None) -> float:
        """Return the largest value of a rank of ``group``, by default of all ranks."""
        largest = torch.tensor(value, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        return float(largest)

    def smallest(self, value: float) -> float:
        """Return the smallest value of any rank."""
        return -self.largest(-value)

    def largest_over_mean(self, total: float, mine: float) -> float:
        """Return the largest value of a data-parallel rank over their mean; 1 where all have the same."""
        data = self._groups.data
        return self.largest(mine, data) * data.size() / total if total else 1.0
