"""One Megatron rank, without Ray: groups in, an optimizer update and a StepReport out; weights out to whoever asks.

A step reads top to bottom in ``train_step``: advantages, packing, global token count, (R2: record routing),
forward and backward under Megatron's own schedule with routing replayed, update, metrics. Knows the other
modules of this room, ``weights`` and ``model_config``; knows neither queue nor engine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from async_rl.config import RunConfig
from async_rl.errors import ReplayError, TrainerError
from async_rl.model_config import check_run, read_model_config
from async_rl.trainer import losses, packing, platform
from async_rl.trainer.advantages import group_advantages
from async_rl.trainer.fingerprint import FingerprintHooks
from async_rl.trainer.logprobs import token_logprobs
from async_rl.trainer.packing import Microbatch, Sample
from async_rl.trainer.policy_sums import PolicySums, policy_sums
from async_rl.trainer.report import StepReport, step_report
from async_rl.types import ExpertIds, Float32Array, Group, Int32Array
from async_rl.weights import names

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource

    from async_rl.trainer.executor import LossFunction, Tensors

# Size of one *.safetensors file of an export: what transformers writes too.
SHARD_BYTES = 5 * 10**9


class Trainer:
    """Builds the model of ``config.model.path`` and trains it as data-parallel rank ``rank`` of ``world_size``.

    init_method: where the ranks meet, for example "tcp://127.0.0.1:29500"; needed for more than one. Every
    rank must make the same calls in the same order. Megatron's state is global: one Trainer per process at a
    time.
    """

    def __init__(
        self, config: RunConfig, *, rank: int = 0, world_size: int = 1, init_method: str | None = None
    ) -> None:
        self._config = config
        self._model_config = read_model_config(config.model.path)
        check_run(config, self._model_config)
        self._device = platform.resolve(config.resources.device)
        self._rank = rank
        platform.activate(self._device)
        platform.init_distributed(self._device, rank, world_size, init_method)
        try:
            self._build()
        except BaseException:
            platform.close_distributed()
            raise

    def _build(self) -> None:
        # Megatron is imported only after the device seam was activated.
        from megatron.core import parallel_state

        from async_rl.trainer import megatron
        from async_rl.trainer.executor import Executor
        from async_rl.trainer.replay import RoutingReplay

        self._model = megatron.build(self._config, self._model_config, self._device)
        self._group = parallel_state.get_data_parallel_group()
        replay = RoutingReplay([self._model.module], self._model_config)
        self._executor = Executor(self._model, replay, self._device)
        self._optimizer = platform.optimizer(self._device, self._model, self._config.trainer.optimizer)
        self._steps = 0
        self._recorded: dict[str, Int32Array] = {}  # R2: trajectory id -> routing [N-1, L, K]

    # ---- training ----

    def train_step(self, groups: Sequence[Group], *, version: int, oldest_version: int) -> StepReport:
        """One optimizer update on this rank's share of the batch; no group may be split over ranks.

        version: the policy version that consumes the tokens. Tokens sampled before ``oldest_version``
        contribute nothing (invariant 4). If no token of any rank contributes, nothing is updated and the
        report says so.
        """
        _check_versions(groups, version)
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        if self._config.trainer.router_replay == "R2":
            self.record_routing([g for g in groups if not self._is_recorded(g)])
            started = _lap(seconds, "record_routing", started)
        trajectories = [t for group in groups for t in group.trajectories]
        samples, extra_positions = self._samples(groups, oldest_version)
        batches = self._pack(samples)
        contributing = sum(int(sample.loss_mask.sum()) for sample in samples)
        sampled = sum(int(t.sampled.sum()) for t in trajectories)
        total = self._all_reduce(
            tokens=contributing,
            stale=sampled - contributing,
            not_sampled=sum(len(t.response_ids) for t in trajectories) - sampled,
            extra_positions=extra_positions,
            fallback=sum(packing.rows_without_routing(batch) for batch in batches),
            groups=len(groups),
            trajectories=len(trajectories),
            microbatches=len(batches),
        )
        started = _lap(seconds, "prepare", started)

        # At least one, so that an all-stale batch has sums too.
        stalenesses = max(version - oldest_version + 1, 1)
        sums = PolicySums.zero(stalenesses, self._device)
        update = self._optimizer.no_update()
        if total["tokens"]:
            loss = self._policy_loss(version, stalenesses, total["tokens"])
            for part in self._executor.forward_backward(batches, loss, verify=self._verifying):
                sums.add(part)
            started = _lap(seconds, "forward_backward", started)
            update = self._optimizer.step()
            started = _lap(seconds, "optimizer", started)
            sums.all_reduce(self._group)
        self._steps += 1
        for trajectory in trajectories:
            self._recorded.pop(trajectory.trajectory_id, None)
        _lap(seconds, "metrics", started)
        return step_report(
            sums,
            update,
            version=version,
            groups=int(total["groups"]),
            trajectories=int(total["trajectories"]),
            masked={"stale": int(total["stale"]), "not_sampled": int(total["not_sampled"])},
            extra_positions=int(total["extra_positions"]),
            fallback_rows=int(total["fallback"]),
            microbatches=int(total["microbatches"]),
            seconds=seconds,
        )

    def supervised_step(self, sequences: Sequence[tuple[Int32Array, npt.NDArray[np.bool_]]]) -> float:
        """One update on the cross entropy of the masked-in tokens: (token ids int32[N], mask bool[N]) per sequence.

        Returns the mean over this step's tokens of all ranks, before the update; the mask of a first token is
        of no effect. Routing is native.
        """
        samples = [_plain_sample(f"sequence {index}", ids, mask[1:]) for index, (ids, mask) in enumerate(sequences)]
        tokens = self._all_reduce(tokens=sum(int(s.loss_mask.sum()) for s in samples))["tokens"]
        if not tokens:
            return 0.0

        def loss(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            logprobs, _entropy = token_logprobs(logits, tensors["labels"])
            summed = -torch.where(tensors["loss_mask"], logprobs, 0.0).sum()
            return summed / tokens, float(summed.detach())

        batches = self._pack(samples, replay=False)
        parts = self._executor.forward_backward(batches, loss)
        self._optimizer.step()
        return self._all_reduce(loss=sum(parts))["loss"] / tokens

    def record_routing(self, groups: Sequence[Group]) -> None:
        """R2's log-prob pass: remember the experts that the trainer's own router chooses for these groups now.

        ``train_step`` replays them and runs this pass itself for groups that are not recorded yet. Call it
        first, with the groups of all updates of a training step, so that later updates replay the routing
        from before the first.
        """
        trajectories = [t for group in groups for t in group.trajectories]
        routing = self.native_routing([np.concatenate([t.prompt_ids, t.response_ids]) for t in trajectories])
        self._recorded.update(zip((t.trajectory_id for t in trajectories), routing, strict=True))

    # ---- asking the model ----

    def logprobs(
        self,
        sequences: Sequence[Int32Array],
        routing: Sequence[ExpertIds | Int32Array] | None = None,
        temperature: float = 1.0,
    ) -> list[Float32Array]:
        """Log-probs float32[N-1] of tokens 1..N-1 of each sequence int32[N], without touching any state.

        routing: [N-1, L, K] per sequence, replayed; rows of packing.NO_ROUTING are routed natively, as all
        are without it.
        """
        batches = self._probe_batches(sequences, routing)

        def collect(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            values, _entropy = token_logprobs(logits, tensors["labels"], temperature)
            return values.sum(), values.cpu().numpy()

        return packing.unpack(self._executor.forward(batches, collect), batches, len(sequences))

    def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """The experts that the routers choose now: int32[N-1, L, K] of each sequence int32[N]."""
        batches = self._probe_batches(sequences, None)
        result = [np.zeros((0, 0, 0), dtype=np.int32)] * len(sequences)
        for batch, recorded in zip(batches, self._executor.record_routing(batches), strict=True):
            # {MoE layer: [T, K]} -> [T, L, K]
            rows = torch.stack([recorded[layer] for layer in sorted(recorded)], dim=1).int().cpu().numpy()
            for index, part in zip(batch.samples, packing.split(rows, batch), strict=True):
                result[index] = part
        return result

    def fingerprints(
        self, sequences: Sequence[Int32Array], routing: Sequence[ExpertIds | Int32Array] | None = None
    ) -> list[Float32Array]:
        """Of the residual stream, float32[layers + 1, N-1, WIDTH] of each sequence as in ``weights.fingerprint``;
        routing as in ``logprobs``."""
        batches = self._probe_batches(sequences, routing)
        with FingerprintHooks(self._model.module) as hooks:

            def collect(_: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
                return logits.new_zeros(()), hooks.take()

            rows = packing.unpack(self._executor.forward(batches, collect), batches, len(sequences))
        return [part.swapaxes(0, 1) for part in rows]

    def weight_source(self) -> WeightSource:
        """The live weights under Hugging Face names, for a push. The first call imports part of vLLM (seconds)."""
        from async_rl.weights.source import MegatronWeightSource

        return MegatronWeightSource(self._model_config, self._parameters(), platform.layout(self._device))

    def save_hf(self, folder: Path) -> None:
        """Write a checkpoint folder like the one that was loaded: weights, config and tokenizer files. Rank 0
        writes.
        """
        if self._rank == 0:
            weights = names.export(self._model_config, self._parameters(), platform.layout(self._device))
            names.write_checkpoint(weights, folder, shard_bytes=SHARD_BYTES)
            for file in self._config.model.path.iterdir():
                if file.is_file() and ".safetensors" not in file.name:
                    shutil.copy2(file, folder / file.name)
        torch.distributed.barrier(group=self._group)

    def close(self) -> None:
        """Leave the process groups. The Trainer is unusable afterwards."""
        platform.close_distributed()

    # ---- one microbatch ----

    def _policy_loss(self, version: int, stalenesses: int, total_tokens: float) -> LossFunction:
        settings = self._config.trainer.loss
        temperature = self._config.rollout.temperature

        def loss(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, PolicySums]:
            current, entropy = token_logprobs(logits, tensors["labels"], temperature)
            mask, behaviour = tensors["loss_mask"], tensors["logprobs"]
            summed, clipped = losses.clipped_policy_loss(
                current,
                behaviour,
                tensors["advantages"],
                mask,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
            )
            sums = policy_sums(
                loss=summed.detach(),
                current=current.detach(),
                behaviour=behaviour,
                entropy=entropy,
                clipped=clipped,
                staleness=version - tensors["versions"].long(),
                resume_position=tensors["resume_position"].long(),
                mask=mask,
                stalenesses=stalenesses,
            )
            return summed / total_tokens, sums

        return loss

    # ---- odds and ends ----

    @property
    def _verifying(self) -> bool:
        return self._steps < self._config.trainer.verify_replay_steps and self._model_config.routing is not None

    def _samples(self, groups: Sequence[Group], oldest_version: int) -> tuple[list[Sample], int]:
        """What the groups are trained on, with the routing to replay; and positions of it that repeat a prefix."""
        mode = self._config.trainer.router_replay
        exact = self._config.async_training.partial_rollout.routing == "exact"
        samples: list[Sample] = []
        repeated = 0
        for group in groups:
            advantages = group_advantages(group.rewards, normalize_by_std=self._config.trainer.loss.normalize_by_std)
            for trajectory, advantage in zip(group.trajectories, advantages.tolist(), strict=True):
                views = packing.samples_of(
                    trajectory, advantage=advantage, oldest_version=oldest_version, per_segment=exact
                )
                if mode == "R2":
                    views = [view.with_routing(self._recorded[trajectory.trajectory_id]) for view in views]
                if mode != "off":
                    for view in views:
                        self._check_routing(view)
                samples += views
                # The last view is the whole sequence, the others are prefixes of it.
                repeated += sum(view.positions for view in views[:-1])
        return samples, repeated

    def _check_routing(self, sample: Sample) -> None:
        """Raise ReplayError unless the sample has no routing, or such as this model can execute."""
        from async_rl.trainer.replay import check_rows

        if sample.routing is None:
            return
        spec = self._model_config.routing
        if spec is None:
            raise ReplayError(f"{sample.name}: has routing, but {self._config.model.path} has no MoE layer")
        check_rows(sample.name, sample.routing, rows=sample.positions, spec=spec)

    def _pack(self, samples: Sequence[Sample], *, replay: bool | None = None) -> list[Microbatch]:
        """``replay``: carry the samples' routing; by default as trainer.router_replay says."""
        if replay is None:
            replay = self._config.trainer.router_replay != "off"
        settings = self._config.trainer
        return packing.pack(
            samples,
            settings.tokens_per_microbatch,
            self._model_config.routing if replay else None,
            settings.microbatch_multiple,
        )

    def _probe_batches(
        self, sequences: Sequence[Int32Array], routing: Sequence[ExpertIds | Int32Array] | None
    ) -> list[Microbatch]:
        """Plain sequences, with ``routing`` to replay where given."""
        samples = [_plain_sample(f"sequence {index}", ids) for index, ids in enumerate(sequences)]
        if routing is not None:
            samples = [sample.with_routing(rows) for sample, rows in zip(samples, routing, strict=True)]
            for sample in samples:
                self._check_routing(sample)
        return self._pack(samples, replay=routing is not None)

    def _is_recorded(self, group: Group) -> bool:
        return all(t.trajectory_id in self._recorded for t in group.trajectories)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self._model.module.named_parameters())

    def _all_reduce(self, **values: float) -> dict[str, float]:
        """Sums over the data-parallel ranks, exact for counts below 2**53."""
        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(flat, group=self._group)
        return dict(zip(values, flat.tolist(), strict=True))


def _plain_sample(name: str, ids: Int32Array, mask: npt.NDArray[np.bool_] | None = None) -> Sample:
    """A sequence without behaviour: every token counts unless a mask bool[N-1] says otherwise."""
    positions = max(len(ids) - 1, 0)
    return Sample(
        name=name,
        token_ids=ids,
        loss_mask=np.ones(positions, dtype=np.bool_) if mask is None else mask,
        logprobs=np.zeros(positions, dtype=np.float32),
        versions=np.zeros(positions, dtype=np.int32),
        advantages=np.zeros(positions, dtype=np.float32),
        resume_position=np.zeros(positions, dtype=np.int8),
    )


def _check_versions(groups: Sequence[Group], version: int) -> None:
    for group in groups:
        for trajectory in group.trajectories:
            newest = int(trajectory.versions.max())
            if newest > version:
                raise TrainerError(
                    f"trajectory {trajectory.trajectory_id}: tokens of version {newest}, consumed at version "
                    f"{version}; its stamps or the trainer's version are wrong"
                )


def _lap(seconds: dict[str, float], phase: str, started: float) -> float:
    now = time.perf_counter()
    seconds[phase] = now - started
    return now
