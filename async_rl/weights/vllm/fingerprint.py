"""Fingerprints of the engine's residual stream, taken by the ``extension`` of vLLM's worker class.

Runs in the process that holds the model. The model has hooks only between ``begin_fingerprints`` and
``end_fingerprints``, that is while a canary that disagreed is diagnosed. Knows the layout that vLLM 0.30 gives the
supported architectures: ``model.model.embed_tokens``, and ``model.model.layers``, each of which returns (its last
contribution, the stream before it). In a compiled graph no hook fires, and there are no fingerprints then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from async_rl.weights.fingerprint import projection


class FingerprintExtension:
    """Methods for ``AsyncLLM.collective_rpc``. Their names must not be any of vLLM's worker class."""

    def begin_fingerprints(self, sequences: list[list[int]]) -> None:
        """Start to watch for these token sequences, each computed in one pass from its first token."""
        worker: Any = self
        worker.async_rl_recorder = _Recorder(worker.get_model(), sequences)

    def end_fingerprints(self) -> list[Any]:
        """Remove the hooks; return fingerprints [L+1][N][WIDTH] by sequence, or None for one that was not seen whole.

        They are nested lists, because that is what vLLM's wire format takes.
        """
        worker: Any = self
        recorder: _Recorder = worker.async_rl_recorder
        del worker.async_rl_recorder
        recorder.close()
        return [rows if len(rows) == recorder.entries else None for rows in recorder.rows]


class _Recorder:
    """Finds the rows of the sequences in each forward pass, among the rows of other requests."""

    def __init__(self, model: Any, sequences: Sequence[list[int]]) -> None:
        self._sequences = sequences
        self.rows: list[list[Any]] = [[] for _ in sequences]
        self._where: dict[int, slice] = {}  # sequence -> its rows in the current pass
        layers = list(model.model.layers)
        self.entries = len(layers) + 1
        self._projection: torch.Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.model.embed_tokens.register_forward_hook(lambda _m, _i, output: self._record(output)),
            *(
                # Summed at once: the next layer's norm adds in place.
                layer.register_forward_hook(lambda _m, _i, output: self._record(output[0].float() + output[1].float()))
                for layer in layers
            ),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self._where = {}
        if kwargs.get("input_ids") is None:
            return
        tokens, positions = kwargs["input_ids"].tolist(), kwargs["positions"].tolist()
        for index, sequence in enumerate(self._sequences):
            size = len(sequence)
            for start in range(len(tokens) - size + 1):
                stop = start + size
                if positions[start:stop] == list(range(size)) and tokens[start:stop] == sequence:
                    self._where[index] = slice(start, stop)
                    self.rows[index] = []
                    break

    def _record(self, stream: torch.Tensor) -> None:
        if not self._where:
            return
        if self._projection is None:
            self._projection = torch.from_numpy(projection(stream.shape[-1])).to(stream.device)
        for index, rows in self._where.items():
            self.rows[index].append((stream[rows].float() @ self._projection).tolist())
