"""One rank of the trainer as the driver calls it: fetches and decodes groups, trains on them, sends weights.

``driver.actors.TrainerRanks`` has a method for each one here. Knows the rollout side only as actor handles, which it
passes to vLLM's weight-transfer client.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from async_rl.config.schema import RunConfig
from async_rl.queue.client import Payload
from async_rl.queue.fetcher import Fetcher
from async_rl.runtime import logs
from async_rl.runtime.interfaces import interface_address, use_interface
from async_rl.types import ExpertIds, Float32Array, Int32Array

log = structlog.get_logger(__name__)

Groups = Mapping[str, Payload]
"""Groups by id, given by reference."""

if TYPE_CHECKING:
    from torch.distributed import Store

    from async_rl.metrics.records import StepReport
    from async_rl.runtime.manifest import Entries
    from async_rl.trainer.megatron.distributed_checkpoint import Save
    from async_rl.weights.object_store import Totals
    from async_rl.weights.vllm.sender import WeightSender


class TrainerWorker:
    """One rank of trainer.parallel, a thin shell around ``Trainer``; ``host`` is the address of its host.

    Every method is called on all ranks at once. Megatron and vLLM are imported in the methods, because the driver loads
    this module to create the actor.
    """

    def __init__(self, config: RunConfig, rank: int, host: str) -> None:
        self._config = config
        self._rank = rank
        self._host = host
        self._store: Store | None = None
        self._fetcher = Fetcher(config)
        self._sender: WeightSender | None = None
        self._save: Save | None = None

    def open_store(self) -> str | None:
        """Serve the store where the ranks meet, on rank 0, at cluster.interface or else at the host's address.

        Returns its address, host:port. Other ranks load the libraries meanwhile, and return None.
        """
        from async_rl.trainer import rendezvous, trainer  # noqa: F401

        if self._rank != 0:
            return None
        self._store, address = rendezvous.open_store(self._meeting_host())
        return address

    def start(self, checkpoint: Path | None = None, store: str | None = None) -> None:
        """Build the model, and load ``checkpoint`` where one is given. Blocks until every rank has started.

        ``store`` is the address that ``open_store`` returned on rank 0; None if there is one rank only.
        """
        from async_rl.trainer import rendezvous
        from async_rl.trainer.trainer import Trainer

        began = time.monotonic()
        if store is not None:
            use_interface(self._config.cluster.interface, rendezvous.host_and_port(store)[0])
            if self._rank != 0:
                self._store = rendezvous.join_store(store)
        self._trainer = Trainer(self._config, rank=self._rank, store=self._store)
        if checkpoint is not None:
            self._trainer.load(checkpoint)
        # Imports vLLM, for ten seconds: while the engines start, instead of while they are paused for the first push.
        importlib.import_module("async_rl.weights.vllm.sender")
        log.info("trainer_ready", seconds=round(time.monotonic() - began, 1))

    def connect(self, rollout_workers: Sequence[Any]) -> None:
        """Set up weight transfer to these rollout actors, in place of earlier ones."""
        from async_rl.weights.vllm.sender import WeightSender

        if self._sender is None:
            source = self._trainer.weight_source()
            self._sender = WeightSender(self._config, self._rank, source=source, host=self._meeting_host)
        self._sender.connect(rollout_workers)

    def fetch(self, mini_batches: Sequence[Groups]) -> list[str]:
        """Read the groups of the next call and keep them, so that all ranks begin that call or none does.

        Returns the ids of groups that are lost.
        """
        return self._fetcher.hold({group_id: payload for batch in mini_batches for group_id, payload in batch.items()})

    def train_step(self, mini_batches: Sequence[Groups], version: int, oldest_version: int) -> list[StepReport]:
        """Do one training step: an optimizer update per mini-batch, on this rank's groups."""
        batches = [self._fetcher.groups(payloads) for payloads in mini_batches]
        # All of the step's groups at once: later updates use log-probs from before the first one.
        self._trainer.prepare([group for batch in batches for group in batch], oldest_version=oldest_version)
        self._outdate_staged_weights()
        return [self._trainer.train_step(batch, version=version, oldest_version=oldest_version) for batch in batches]

    def accumulate(self, mini_batches: Sequence[Groups], version: int, oldest_version: int, *, first: bool) -> None:
        """Compute the gradients of this rank's share of a part of a step's groups; ``first`` begins the step."""
        if first:
            self._trainer.begin_step(version=version, oldest_version=oldest_version)
        self._trainer.accumulate([group for batch in mini_batches for group in self._fetcher.groups(batch)])

    def finish_step(self) -> StepReport:
        """Do the optimizer update of the step whose groups were accumulated."""
        self._outdate_staged_weights()
        return self._trainer.finish_step()

    def stage_weights(self) -> Sequence[Mapping[str, Any]] | None:
        """Copy the weights of now to where replicas take them from, while the engines generate.

        Returns what each connected replica needs in order to take them; None where ``send_weights`` must be called
        instead.
        """
        if self._sender is None:
            raise RuntimeError("connect() must be called before stage_weights()")
        return self._sender.stage()

    @property
    def published(self) -> Totals | None:
        """What this rank has put into the object store; None where it puts nothing there."""
        return None if self._sender is None else self._sender.published

    def send_weights(self, version: int, only: int | None = None) -> float:
        """Transfer the weights as policy version ``version`` to all connected rollout actors, or to that at ``only``.

        Returns the seconds that it took.
        """
        if self._sender is None:
            raise RuntimeError("connect() must be called before send_weights()")
        start = time.monotonic()
        self._sender.send(version, only)
        logs.bind(version=version)
        return time.monotonic() - start

    def logprobs(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]:
        """Return the log-probs [N-1] of tokens 1..N-1 of each sequence, for the canary.

        ``routed_experts`` [N-1, L, K], where given, are replayed.
        """
        return self._trainer.logprobs(sequences, routed_experts)

    def fingerprints(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]:
        """Fingerprint the residual stream layer by layer, with ``routed_experts`` replayed where given."""
        return self._trainer.fingerprints(sequences, routed_experts)

    def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """Return the experts that the trainer's own routers choose, [N-1, L, K] for each sequence."""
        return self._trainer.native_routing(sequences)

    def begin_save(self, folder: Path) -> None:
        """Begin to write the trainer's state into ``folder``. Returns once it is copied: training may continue."""
        self._save = self._trainer.begin_save(folder)

    def is_saved(self) -> bool:
        """Return whether this rank's files are written."""
        return self._save is None or self._save.done()

    def finish_save(self) -> Entries:
        """Complete the save of all ranks. Returns the entries of this rank's files. Raises CheckpointError."""
        if self._save is None:
            raise RuntimeError("begin_save() must be called before finish_save()")
        save, self._save = self._save, None
        return save.finish()

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint folder. Rank 0 writes."""
        folder.mkdir(parents=True, exist_ok=True)
        self._trainer.save_hf(folder)

    def _meeting_host(self) -> str:
        """Return the address of this host at which rank 0 listens for other processes: that of cluster.interface."""
        interface = self._config.cluster.interface
        return self._host if interface is None else interface_address(interface)

    def _outdate_staged_weights(self) -> None:
        if self._sender is not None:
            self._sender.outdate()

    def shutdown(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._trainer.close()
