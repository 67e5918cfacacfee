"""Data-parallel ranks as threads, which add up numbers as ``Collectives.sum_over_data`` does."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class DataRanks:
    """So many ranks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=10)
        self._given: list[dict[str, float]] = [{}] * count

    def sum_over_data(self, rank: int) -> Callable[..., dict[str, float]]:
        """Return the function with which ``rank`` adds up its numbers and those of the others."""

        def added(**values: float) -> dict[str, float]:
            self._given[rank] = values
            self._barrier.wait()
            total = {name: sum(given[name] for given in self._given) for name in values}
            self._barrier.wait()
            return total

        return added

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return function(rank) of each rank, called at one time."""
        if self.count == 1:
            return [function(0)]
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(function, range(self.count)))
