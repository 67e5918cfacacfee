"""Fingerprints of the trainer's residual stream, by forward hooks. Knows the layout of Megatron's GPTModel.

The engine's counterpart is ``weights.vllm_fingerprint``; what they are is in ``weights.fingerprint``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch

from async_rl.types import Float32Array
from async_rl.weights.fingerprint import projection


class FingerprintHooks:
    """While entered, each forward pass of ``gpt`` leaves its fingerprints, for ``take`` to fetch before the next."""

    def __init__(self, gpt: Any) -> None:
        self._gpt = gpt
        self._hooks: list[Any] = []
        self._taken: dict[int, torch.Tensor] = {}  # entry -> [T, WIDTH]
        self._projection: torch.Tensor | None = None

    def __enter__(self) -> Self:
        self._hooks.append(self._gpt.embedding.register_forward_hook(lambda _m, _i, output: self._record(0, output)))
        for layer in self._gpt.decoder.layers:
            # Megatron counts layers from 1, which is the entry after the embeddings.
            self._hooks.append(
                layer.register_forward_hook(
                    lambda _m, _i, output, entry=layer.layer_number: self._record(entry, output[0])
                )
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Float32Array:
        """float32[T, L+1, WIDTH] of the last forward pass."""
        entries = [self._taken[entry] for entry in sorted(self._taken)]
        self._taken = {}
        result: Float32Array = torch.stack(entries, dim=1).cpu().numpy()
        return result

    def _record(self, entry: int, stream: torch.Tensor) -> None:
        """``stream`` [T, 1, H]."""
        if self._projection is None:
            self._projection = torch.from_numpy(projection(stream.shape[-1])).to(stream.device)
        self._taken[entry] = stream[:, 0].detach().float() @ self._projection
