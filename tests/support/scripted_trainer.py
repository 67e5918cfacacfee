"""A trainer that reads its groups as the real one does and computes nothing, for measuring what surrounds it.

Goes with an engine whose log-probs are the same whatever its weights are: no weights are transferred.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from async_rl.metrics.records import StepReport
from async_rl.trainer.actor import TrainerActor
from async_rl.trainer.worker import Groups
from async_rl.types import ExpertIds, Float32Array, Int32Array
from tests.support.step_records import step_report

LOGPROB = -3.0
"""The log-prob of every token of the canary's probe."""


class ScriptedTrainer(TrainerActor):
    """One rank. Stands in for ``TrainerActor``."""

    def start(self, checkpoint: Path | None = None, store: str | None = None) -> None:
        del checkpoint, store
        self._actors: list[Any] = []
        self._groups = 0

    def connect(self, rollout_workers: Sequence[Any]) -> None:
        self._actors = list(rollout_workers)

    def train_step(self, mini_batches: Sequence[Groups], version: int, oldest_version: int) -> list[StepReport]:
        del oldest_version
        return [step_report(version=version, groups=len(self._fetcher.groups(payloads))) for payloads in mini_batches]

    def accumulate(self, mini_batches: Sequence[Groups], version: int, oldest_version: int, *, first: bool) -> None:
        del oldest_version
        groups = sum(len(self._fetcher.groups(payloads)) for payloads in mini_batches)
        self._groups = groups if first else self._groups + groups
        self._version = version

    def finish_step(self) -> StepReport:
        return dataclasses.replace(step_report(), version=self._version, groups=self._groups)

    def stage_weights(self) -> None: ...

    def send_weights(self, version: int, only: int | None = None) -> float:
        for actor in self._actors if only is None else [self._actors[only]]:
            ray.get(actor.update_weight_version.remote(str(version)))
        return 0.0

    def logprobs(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]:
        del routed_experts
        return [np.full(len(sequence) - 1, LOGPROB, np.float32) for sequence in sequences]

    def export(self, folder: Path) -> None: ...

    def shutdown(self) -> None: ...
