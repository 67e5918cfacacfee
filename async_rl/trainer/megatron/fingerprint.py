"""Computes fingerprints of the trainer's residual stream in forward hooks. Knows the layout of Megatron's GPTModel.

The engine's counterpart is ``weights.vllm.fingerprint``; what fingerprints are is in ``weights.fingerprint``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from async_rl.types import Float32Array
from async_rl.weights.fingerprint import projection


class FingerprintHooks:
    """Hooks that, while entered, fingerprint the layers of ``chunks`` in each of their forward passes.

    A chunk is Megatron's GPTModel or a pipeline stage of one. ``take`` fetches the fingerprints, before the next pass.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks = chunks
        self._hooks: list[Any] = []
        self._taken: dict[int, torch.Tensor] = {}  # entry -> [rows, WIDTH]
        self._projection: torch.Tensor | None = None

    def __enter__(self) -> Self:
        for chunk in self._chunks:
            if chunk.pre_process:
                self._watch(chunk.embedding, 0, lambda output: output)
            for layer in chunk.decoder.layers:
                # Megatron counts layers from 1, which is the entry after the embeddings.
                self._watch(layer, layer.layer_number, lambda output: output[0])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[int, Float32Array]:
        """Return the last pass's fingerprints: by entry (0 for the embeddings, then each layer), float32[rows, WIDTH].

        The rows are those that a router of this rank sees.
        """
        taken, self._taken = self._taken, {}
        return {entry: rows.cpu().numpy() for entry, rows in taken.items()}

    def _watch(self, module: Any, entry: int, stream: Callable[[Any], torch.Tensor]) -> None:
        self._hooks.append(module.register_forward_hook(lambda _m, _i, output: self._record(entry, stream(output))))

    def _record(self, entry: int, stream: torch.Tensor) -> None:
        """Keep the fingerprints of ``stream`` [rows, 1, H]."""
        if self._projection is None:
            self._projection = torch.from_numpy(projection(stream.shape[-1])).to(stream.device)
        self._taken[entry] = stream[:, 0].detach().float() @ self._projection
