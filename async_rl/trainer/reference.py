"""Keeps the weights of the reference policy, and lends them to the model. Knows torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ReferenceWeights:
    """A copy in main memory of the parameters that ``chunks`` have now; pinned, if the model is on a GPU."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._reference = [_in_main_memory(parameter.detach()) for parameter in self._parameters]

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Let the model compute with the copy until the block ends, then with its own weights again.

        Its parameters point to other memory meanwhile, and nothing is copied on a CPU. A GPU gets the copy beside the
        model's weights.
        """
        own = [parameter.data for parameter in self._parameters]
        try:
            for parameter, value in zip(self._parameters, self._reference, strict=True):
                parameter.data = value.to(parameter.device, non_blocking=True)
            yield
        finally:
            for parameter, value in zip(self._parameters, own, strict=True):
                parameter.data = value


def _in_main_memory(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().pin_memory() if values.is_cuda else values.clone()
