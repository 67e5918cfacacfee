"""Keeps the weights of the reference policy, and lends them to the model. Knows torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ReferenceWeights:
    """A copy in main memory of the parameters that ``chunks`` have now."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._reference = self._copied()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Load the copy into the model until the block ends, then the model's own weights again."""
        own = self._copied()
        self._load(self._reference)
        try:
            yield
        finally:
            self._load(own)

    def _copied(self) -> list[torch.Tensor]:
        return [parameter.detach().cpu().clone() for parameter in self._parameters]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _load(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
