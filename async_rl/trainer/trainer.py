"""Trains one Megatron rank, without Ray: groups in, an optimizer update and a StepReport out.

A step reads top to bottom in ``accumulate`` and ``finish_step``: (R2: record routing,) advantages, packing, forward and
backward under Megatron's own schedule with routing replayed; then the global counts, the update and the metrics. Knows
the other modules of this room and ``models``; knows neither the queue nor an engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from async_rl.config.schema import RunConfig
from async_rl.metrics.records import StepReport
from async_rl.models.checkpoint_files import SHARD_BYTES
from async_rl.models.config import check_run, read_model_config
from async_rl.trainer import losses
from async_rl.trainer.advantages import load_advantages
from async_rl.trainer.collectives import Collectives
from async_rl.trainer.credit import Credited, with_credit
from async_rl.trainer.export import write_hf
from async_rl.trainer.megatron import platform
from async_rl.trainer.objective import cross_entropy, policy_objective
from async_rl.trainer.packing import Microbatch, Packer
from async_rl.trainer.parallel import Place
from async_rl.trainer.policy_sums import PolicySums
from async_rl.trainer.probes import ModelProbe
from async_rl.trainer.reference import ReferenceWeights
from async_rl.trainer.report import step_report
from async_rl.trainer.samples import NO_ROUTING, BoolArray, Sample, check_routed_experts, group_samples, plain_sample
from async_rl.trainer.step import Step, masked_tokens
from async_rl.types import ExpertIds, Float32Array, Group, Int32Array, RoutingSpec

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource

    from async_rl.trainer.megatron.distributed_checkpoint import Save
    from async_rl.trainer.megatron.gather import GatheredWeights

# Microbatches for each pipeline stage from which on a schedule runs before the step's end: its stages then idle at most
# a fifth of the time, (pp - 1) / (4 pp + pp - 1).
MICROBATCHES_PER_STAGE = 4


class Trainer:
    """Builds this rank's part of the model of ``config.model.path``, as trainer.parallel lays it out, and trains it.

    store: where the ranks meet (``rendezvous``); needed for more than one rank. Every rank must make the same calls in
    the same order: ranks of one data-parallel index with the same groups, others with groups of their own. Megatron's
    state is global: one Trainer per process at a time.
    """

    def __init__(self, config: RunConfig, *, rank: int = 0, store: torch.distributed.Store | None = None) -> None:
        self._config = config
        self._model_config = read_model_config(config.model.path)
        check_run(config, self._model_config)
        self._device = platform.resolve(config.resources.device)
        self._place = Place.of(config.trainer.parallel, rank)
        platform.activate(self._device, config.engine_share)
        self._groups = platform.init_distributed(self._device, self._place, store)
        self._ranks = Collectives(self._groups, self._device)
        try:
            self._build()
        except BaseException:
            platform.close_distributed()
            raise

    def _build(self) -> None:
        # Megatron is imported only after the device seam was activated.
        from async_rl.trainer.megatron import model as megatron_model
        from async_rl.trainer.megatron.distributed_checkpoint import DistributedCheckpoint
        from async_rl.trainer.megatron.executor import Executor
        from async_rl.trainer.megatron.replay import RoutingReplay

        self._chunks = megatron_model.build(self._config, self._model_config, self._device, self._place)
        replay = RoutingReplay([chunk.module for chunk in self._chunks], self._model_config, self._place)
        self._executor = Executor(self._chunks, replay, self._place, self._device)
        self._optimizer = platform.optimizer(self._device, self._chunks, self._config.trainer.optimizer)
        self._probe = ModelProbe(
            self._executor, self._model_config, self._config.trainer, self._place, self._groups, self._device
        )
        self._checkpoint = DistributedCheckpoint(
            self._config, self._model_config, self._chunks, self._optimizer, self._place, self._device
        )
        loss = self._config.trainer.loss
        self._policy, self._estimator = losses.load_policy(loss), load_advantages(loss)
        self._reference = ReferenceWeights(self._chunks) if loss.kl != "none" else None
        self._steps = 0
        self._prepared: dict[str, list[Sample]] = {}  # by group id

    # ---- training ----

    def train_step(self, groups: Sequence[Group], *, version: int, oldest_version: int) -> StepReport:
        """Make one optimizer update on this rank's share of the mini-batch; data-parallel ranks share no group.

        version: the policy version that consumes the tokens. Tokens sampled before ``oldest_version`` contribute
        nothing (invariant 4). If no token of any rank contributes, nothing is updated and the report says so.
        """
        self.begin_step(version=version, oldest_version=oldest_version)
        self.accumulate(groups)
        return self.finish_step()

    def begin_step(self, *, version: int, oldest_version: int) -> None:
        """Open an update whose groups arrive in several calls of ``accumulate``; see ``train_step``."""
        self._executor.zero_gradients()
        # At least one staleness, so that a mini-batch of stale tokens alone has sums too.
        sums = PolicySums.zero(max(version - oldest_version + 1, 1), self._device, self._config.rollout.engine_names)
        self._step = Step(version, oldest_version, sums, Packer.of(self._config.trainer, self._replayed_spec))

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Compute the microbatches that these groups of this rank fill; what remains waits for the next call.

        In a pipeline full ones wait too, until they keep all stages busy.
        """
        step = self._step
        step.check_versions(groups)
        started = time.perf_counter()
        self.prepare(groups, oldest_version=step.oldest_version)
        started = step.lap("record_routing", started)
        samples, rejected = self._with_credit(groups)
        step.count_groups(groups, samples)
        step.count_rejected(rejected)
        if self._config.trainer.skip_zero_advantage:
            samples = step.with_gradient(samples)
        step.ready += step.packer.add(samples)
        started = step.lap("prepare", started)
        stages = self._place.sizes.pp
        # Each schedule fills and drains the pipeline: with few microbatches its stages would idle most of the time.
        if stages == 1 or self._ranks.smallest(len(step.ready)) >= MICROBATCHES_PER_STAGE * stages:
            self._forward_backward(step.take_ready())
        step.lap("forward_backward", started)

    def finish_step(self) -> StepReport:
        """Compute the microbatches that wait, update the parameters, and report."""
        step = self._step
        started = time.perf_counter()
        self._forward_backward(step.take_ready() + step.packer.flush(), last=True)
        started = step.lap("forward_backward", started)
        total = self._ranks.sum_over_data(**step.counts)
        divisor = losses.denominator(
            self._config.trainer.loss.aggregation,
            tokens=total["tokens"],
            rollouts=total["counting_rollouts"],
            groups=total["counting_groups"],
        )
        update = self._optimizer.no_update()
        step.sums.replayed_choices += torch.tensor(
            self._executor.take_disagreement(), dtype=torch.float64, device=self._device
        )
        if total["tokens"]:
            self._executor.finish_gradients(divisor)
            started = step.lap("forward_backward", started)
            update = self._optimizer.step()
            started = step.lap("optimizer", started)
            step.sums.all_reduce(torch.distributed.group.WORLD)
        self._steps += 1
        step.lap("metrics", started)
        return step_report(
            step.sums,
            update,
            denominator=divisor,
            version=step.version,
            groups=int(total["groups"]),
            trajectories=int(total["trajectories"]),
            masked=masked_tokens(total, rejected=step.sums["rejected"]),
            extra_positions=int(total["extra_positions"]),
            fallback_rows=int(total["fallback"]),
            microbatches=int(total["microbatches"]),
            padding_ratio=total["padding"] / max(total["positions"], 1.0),
            rank_cost_ratio=self._ranks.largest_over_mean(total["cost"], step.counts["cost"]),
            seconds=step.seconds,
        )

    def _forward_backward(self, batches: Sequence[Microbatch], *, last: bool = False) -> None:
        step = self._step
        step.count_microbatches(batches, self._model_config.sequence_cost)
        objective = policy_objective(
            self._config.trainer.loss,
            self._policy,
            vocabulary=self._groups.vocabulary,
            context=self._groups.context,
            version=step.version,
            empty=step.sums.empty,
        )
        filler = step.packer.filler()
        for part in self._executor.accumulate(batches, objective, filler=filler, last=last, verify=self._verifying):
            if self._place.reports_loss:
                step.sums.add(part)

    def supervised_step(self, sequences: Sequence[tuple[Int32Array, BoolArray]]) -> float:
        """Make one update on the cross entropy of given tokens, and return its mean over all ranks before the update.

        sequences: (token ids int32[N], mask bool[N] of the tokens that count) each. The mask of a first token has no
        effect. Routing is native.
        """
        samples = [plain_sample(f"sequence {index}", ids, mask[1:]) for index, (ids, mask) in enumerate(sequences)]
        tokens = self._ranks.sum_over_data(tokens=sum(int(s.loss_mask.sum()) for s in samples))["tokens"]
        if not tokens:
            return 0.0

        packer = Packer.of(self._config.trainer, None)
        self._executor.zero_gradients()
        batches = packer.add(samples) + packer.flush()
        parts = self._executor.accumulate(batches, cross_entropy(self._groups.vocabulary), filler=packer.filler())
        self._executor.finish_gradients(tokens)
        self._optimizer.step()
        mine = torch.tensor(sum(parts) if self._place.reports_loss else 0.0, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(mine)
        return float(mine) / tokens

    def prepare(self, groups: Sequence[Group], *, oldest_version: int) -> None:
        """Make the samples of these groups, with all that depends on the weights before their update.

        That is, for R2, the experts that the trainer's own router chooses, and where the loss needs them, log-probs
        under the proximal and the reference policy. ``accumulate`` does this itself for groups that have not been
        prepared. Call it first, with the groups of all updates of a training step, so that later updates use what was
        computed before the first.
        """
        fresh = [group for group in groups if group.group_id not in self._prepared]
        owned = [
            (group.group_id, sample)
            for group in fresh
            for sample in group_samples(group, self._config, oldest_version=oldest_version)
        ]
        samples = self._with_passes([sample for _, sample in owned])
        self._prepared |= {group.group_id: [] for group in fresh}
        for (group_id, _), sample in zip(owned, samples, strict=True):
            self._prepared[group_id].append(sample)

    def _with_passes(self, samples: list[Sample]) -> list[Sample]:
        """Return the samples with their routed experts checked, and with what forward passes over them compute."""
        replay, loss = self._config.trainer.router_replay, self._config.trainer.loss
        with_pass = replay == "R2" or loss.proximal == "recompute" or loss.kl != "none"
        # All ranks make a pass if any rank has samples: the others compute padding.
        needed = with_pass and self._ranks.largest(len(samples)) > 0
        if needed and replay == "R2":
            routed_experts = self.native_routing([sample.token_ids for sample in samples])
            samples = [sample.with_routed_experts(rows) for sample, rows in zip(samples, routed_experts, strict=True)]
        if replay != "off":
            for sample in samples:
                check_routed_experts(sample, self._model_config.routing_spec)
        if needed and loss.proximal == "recompute":
            found = self._logprobs_of(samples)
            samples = [sample.with_logprobs(proximal=values) for sample, values in zip(samples, found, strict=True)]
        if needed and self._reference is not None:
            with self._reference.loaded():
                found = self._logprobs_of(samples)
            samples = [sample.with_logprobs(reference=values) for sample, values in zip(samples, found, strict=True)]
        return samples

    def _logprobs_of(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """Return float32[N-1] of each sample, computed as in training: with replay, at the sampling temperature."""
        routed_experts = None
        if (spec := self._replayed_spec) is not None:
            absent = np.int32(NO_ROUTING)
            shape = (spec.num_moe_layers, spec.top_k)
            routed_experts = [
                np.full((s.positions, *shape), absent) if s.routed_experts is None else s.routed_experts
                for s in samples
            ]
        return self.logprobs([s.token_ids for s in samples], routed_experts, [s.temperature for s in samples])

    def _with_credit(self, groups: Sequence[Group]) -> Credited:
        """Take the prepared samples of these groups, and give their tokens advantages and weights."""
        return with_credit(
            [(group, self._prepared.pop(group.group_id)) for group in groups],
            self._config.trainer.loss,
            self._estimator,
            max_response_tokens=self._config.rollout.max_response_tokens,
            sum_over_data=self._ranks.sum_over_data,
        )

    # ---- probes and weights ----

    def logprobs(
        self,
        sequences: Sequence[Int32Array],
        routed_experts: Sequence[ExpertIds | Int32Array] | None = None,
        temperature: float | Sequence[Float32Array | float] = 1.0,
    ) -> list[Float32Array]:
        """Return log-probs float32[N-1] of each sequence int32[N]; see ``ModelProbe.logprobs``."""
        return self._probe.logprobs(sequences, routed_experts, temperature)

    def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """Return the experts that the routers choose now, int32[N-1, L, K] of each sequence int32[N]."""
        return self._probe.native_routing(sequences)

    def fingerprints(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds | Int32Array] | None = None
    ) -> list[Float32Array]:
        """Return float32[layers + 1, N-1, WIDTH] of each sequence int32[N]; see ``ModelProbe.fingerprints``."""
        return self._probe.fingerprints(sequences, routed_experts)

    def weights(self, **spread: Any) -> GatheredWeights:
        """Return the live weights under Hugging Face names, tensor by tensor; ``spread`` as ``GatheredWeights``."""
        from async_rl.trainer.megatron.gather import GatheredWeights

        modules, size = [chunk.module for chunk in self._chunks], self._config.sync.gather_bucket_bytes
        return GatheredWeights(modules, self._model_config, self._place, platform.layout(self._device), size, **spread)

    def weight_source(self) -> WeightSource:
        """Return the live weights for vLLM's weight transfer. The first call imports part of vLLM (seconds)."""
        from async_rl.weights.vllm.source import StreamedSource

        return StreamedSource(self.weights(by_stage=self._config.sync.senders == "stages"))

    # ---- files ----

    def save_hf(self, folder: Path, file_bytes: int = SHARD_BYTES) -> None:
        """Write a checkpoint folder like the one that was loaded: weights, config and tokenizer files.

        Every rank calls it. All write files of ``file_bytes`` in turns; rank 0 alone where other hosts lack the folder.
        """
        weights = self.weights(file_bytes=file_bytes, writers=None if self._config.cluster.shared_fs else 1)
        write_hf(weights, folder, self._config.model.path, self._model_config, self._place.rank)

    def begin_save(self, folder: Path) -> Save:
        """Begin to write model, optimizer, schedule and random state into ``folder``, each rank its part.

        Returns once they are copied. ``driver.checkpoint_folder`` makes a whole checkpoint of the finished folder.
        """
        return self._checkpoint.begin_save(folder, updates=self._steps)

    def load(self, path: Path) -> None:
        """Restore the checkpoint ``path``, which a trainer in any layout on the same kind of device may have written.

        Raises CheckpointDamaged where a file is not as it was written, and CheckpointError where the checkpoint is not
        of this model or device.
        """
        self._steps = self._checkpoint.load(path)

    def close(self) -> None:
        """Leave the process groups. The Trainer is unusable afterwards."""
        platform.close_distributed()

    # ---- helpers ----

    @property
    def _verifying(self) -> bool:
        return self._steps < self._config.trainer.verify_replay_steps and self._model_config.routing_spec is not None

    @property
    def _replayed_spec(self) -> RoutingSpec | None:
        """The layout of the routed experts that training replays; None if it replays none."""
        return None if self._config.trainer.router_replay == "off" else self._model_config.routing_spec
