"""TrainerWorker: one Megatron rank as an actor. A thin shell around ``Trainer``: fetches, decodes, pushes, compares.

Made a Ray actor by ``cluster``. Knows the rollout side only as actor handles, passed on to vLLM's weight-sync client.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from async_rl.config.schema import RunConfig
from async_rl.queue.client import Fetcher, Payload
from async_rl.runtime import logs
from async_rl.types import ExpertIds, Float32Array, Int32Array

log = structlog.get_logger(__name__)

if TYPE_CHECKING:
    from async_rl.trainer.report import StepReport
    from async_rl.weights.vllm.sender import WeightSender


class TrainerWorker:
    """Rank ``rank`` of the trainer's ranks (``trainer.parallel``), which meet at ``init_method`` (tcp://host:port).

    Megatron and vLLM are imported in the methods: the driver loads this module to create the actor, but not them.
    """

    def __init__(self, config: RunConfig, rank: int, init_method: str | None) -> None:
        self._config = config
        self._rank = rank
        self._init_method = init_method
        self._fetcher = Fetcher(config)
        self._sender: WeightSender | None = None

    def start(self, checkpoint: Path | None = None) -> None:
        """Build the model, and go on from ``checkpoint``. Blocks until every rank has come."""
        from async_rl.trainer.trainer import Trainer

        began = time.monotonic()
        self._trainer = Trainer(self._config, rank=self._rank, init_method=self._init_method)
        if checkpoint is not None:
            self._trainer.load(checkpoint)
        log.info("trainer ready", seconds=round(time.monotonic() - began, 1))

    def connect(self, rollout_workers: Sequence[Any]) -> None:
        """Set up weight transfer to these rollout actors, in place of others. Called on every rank at once."""
        from async_rl.weights.vllm.sender import WeightSender

        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._sender = WeightSender(
            self._config, self._rank, source=self._trainer.weight_source(), rollout_workers=rollout_workers
        )

    def train_step(
        self, mini_batches: Sequence[Sequence[Payload]], version: int, oldest_version: int
    ) -> list[StepReport]:
        """One training step: an optimizer update per mini-batch, on this rank's groups, given by reference."""
        batches = [self._fetcher.groups(payloads) for payloads in mini_batches]
        # All of the step's groups at once: later updates go by what was before the first.
        self._trainer.prepare([group for batch in batches for group in batch], oldest_version=oldest_version)
        return [self._trainer.train_step(batch, version=version, oldest_version=oldest_version) for batch in batches]

    def accumulate(self, payloads: Sequence[Payload], version: int, oldest_version: int, *, first: bool) -> None:
        """A part of a step's groups, this rank's of those that are there; ``first`` opens the step."""
        if first:
            self._trainer.begin_step(version=version, oldest_version=oldest_version)
        self._trainer.accumulate(self._fetcher.groups(payloads))

    def finish_step(self) -> StepReport:
        """The update of the step whose groups were accumulated."""
        return self._trainer.finish_step()

    def push(self, version: int, only: int | None = None) -> float:
        """Send the weights as policy version ``version`` to every rollout actor, or to one, by its place among them.
        Returns the seconds it took."""
        if self._sender is None:
            raise RuntimeError("connect() must come before push()")
        start = time.monotonic()
        self._sender.send(version, only)
        logs.bind(version=version)
        return time.monotonic() - start

    def logprobs(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]:
        """Log-probs of tokens 1..N-1 of each sequence, with ``routed_experts`` replayed where given; for the canary."""
        return self._trainer.logprobs(sequences, routed_experts)

    def fingerprints(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]:
        """Of the residual stream, layer by layer, with ``routed_experts`` replayed where given."""
        return self._trainer.fingerprints(sequences, routed_experts)

    def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """The experts that the trainer's own router chooses, [N-1, L, K] of each sequence."""
        return self._trainer.native_routing(sequences)

    def save(self, folder: Path) -> float:
        """Write the trainer's state into ``folder``. Called on every rank at once. Returns the seconds it took."""
        start = time.monotonic()
        self._trainer.save(folder)
        return time.monotonic() - start

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint folder. Called on every rank at once; rank 0 writes."""
        folder.mkdir(parents=True, exist_ok=True)
        self._trainer.save_hf(folder)

    def shutdown(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._trainer.close()
