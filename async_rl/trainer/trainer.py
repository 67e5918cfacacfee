"""One Megatron rank, without Ray: groups in, an optimizer update and a StepReport out; weights out to whoever asks.

A step reads top to bottom in ``accumulate`` and ``finish_step``: (R2: record routing,) advantages, packing, forward and
backward under Megatron's own schedule with routing replayed; then the global counts, update, metrics. Knows the other
modules of this room, ``weights`` and ``model_config``; knows neither queue nor engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from async_rl.config.schema import RunConfig
from async_rl.errors import ReplayError
from async_rl.metrics.records import StepReport
from async_rl.models.config import check_run, read_model_config
from async_rl.trainer import losses, packing, parallel
from async_rl.trainer.advantages import (
    batch_normalized,
    batch_sums,
    group_advantages,
    load_advantages,
)
from async_rl.trainer.fingerprint import FingerprintHooks
from async_rl.trainer.logprobs import token_logprobs
from async_rl.trainer.megatron import platform
from async_rl.trainer.packing import Microbatch, Packer, Sample, plain_sample
from async_rl.trainer.parallel import Int64Array, Place
from async_rl.trainer.policy_sums import PolicySums
from async_rl.trainer.report import step_report
from async_rl.trainer.step import Step
from async_rl.types import ExpertIds, Float32Array, Group, Int32Array
from async_rl.weights.fingerprint import WIDTH

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource

    from async_rl.trainer.export import Weights
    from async_rl.trainer.megatron.executor import Tensors

Scalar = TypeVar("Scalar", bound=np.generic)


class Trainer:
    """Builds this rank's part of the model of ``config.model.path``, as trainer.parallel lays it out, and trains it.

    init_method: where the ranks meet, for example "tcp://127.0.0.1:29500"; needed for more than one. Every
    rank must make the same calls in the same order: ranks of one data-parallel index with the same groups, others with
    groups of their own. Megatron's state is global: one Trainer per process at a time.
    """

    def __init__(self, config: RunConfig, *, rank: int = 0, init_method: str | None = None) -> None:
        self._config = config
        self._model_config = read_model_config(config.model.path)
        check_run(config, self._model_config)
        self._device = platform.resolve(config.resources.device)
        self._place = Place.of(config.trainer.parallel, rank)
        platform.activate(self._device)
        self._replica = platform.init_distributed(self._device, self._place, init_method)
        try:
            self._build()
        except BaseException:
            platform.close_distributed()
            raise

    def _build(self) -> None:
        # Megatron is imported only after the device seam was activated.
        from megatron.core import parallel_state

        from async_rl.trainer.megatron import model as megatron_model
        from async_rl.trainer.megatron.distributed_checkpoint import DistributedCheckpoint
        from async_rl.trainer.megatron.executor import Executor
        from async_rl.trainer.megatron.replay import RoutingReplay

        self._chunks = megatron_model.build(self._config, self._model_config, self._device, self._place)
        replay = RoutingReplay([chunk.module for chunk in self._chunks], self._model_config, self._place)
        self._executor = Executor(self._chunks, replay, self._place, self._device)
        self._optimizer = platform.optimizer(self._device, self._chunks, self._config.trainer.optimizer)
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        self._vocabulary = tensor_group if tensor_group.size() > 1 else None
        self._checkpoint = DistributedCheckpoint(
            self._config, self._model_config, self._chunks, self._optimizer, self._place, self._device
        )
        loss = self._config.trainer.loss
        self._policy, self._estimator = losses.load_policy(loss), load_advantages(loss)
        self._reference = self._copy_of_parameters() if loss.kl != "none" else None
        self._steps = 0
        self._prepared: dict[str, list[Sample]] = {}  # by group id

    # ---- training ----

    def train_step(self, groups: Sequence[Group], *, version: int, oldest_version: int) -> StepReport:
        """One optimizer update on this rank's share of the batch; no group may be split over data-parallel ranks.

        version: the policy version that consumes the tokens. Tokens sampled before ``oldest_version``
        contribute nothing (invariant 4). If no token of any rank contributes, nothing is updated and the
        report says so.
        """
        self.begin_step(version=version, oldest_version=oldest_version)
        self.accumulate(groups)
        return self.finish_step()

    def begin_step(self, *, version: int, oldest_version: int) -> None:
        """Open an update whose groups come in several calls of ``accumulate``; see ``train_step``."""
        self._executor.zero_gradients()
        # At least one staleness, so that an all-stale batch has sums too.
        sums = PolicySums.zero(max(version - oldest_version + 1, 1), self._device)
        self._step = Step(version, oldest_version, sums, self._packer())

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Compute the microbatches that these groups of this rank fill; the rest waits for the next ones."""
        step = self._step
        step.check_versions(groups)
        started = time.perf_counter()
        self.prepare(groups, oldest_version=step.oldest_version)
        started = step.lap("record_routing", started)
        samples = self._with_advantages(groups)
        step.count_groups(groups, samples)
        batches = step.packer.add(samples)
        started = step.lap("prepare", started)
        self._forward_backward(batches)
        step.lap("forward_backward", started)

    def finish_step(self) -> StepReport:
        """Compute what is left, update the parameters, and report."""
        step = self._step
        started = time.perf_counter()
        self._forward_backward(step.packer.flush())
        started = step.lap("forward_backward", started)
        total = self._sum_over_data(**step.counts)
        divisor = losses.denominator(self._config.trainer.loss.aggregation, total["tokens"], total["sequences"])
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
            masked={"stale": int(total["sampled"] - total["tokens"]), "not_sampled": int(total["not_sampled"])},
            extra_positions=int(total["extra_positions"]),
            fallback_rows=int(total["fallback"]),
            microbatches=int(total["microbatches"]),
            padding_ratio=total["padding"] / max(total["positions"], 1.0),
            rank_cost_ratio=self._largest_over_mean(total["cost"], step.counts["cost"]),
            seconds=step.seconds,
        )

    def _forward_backward(self, batches: Sequence[Microbatch]) -> None:
        from async_rl.trainer.objective import policy_objective

        step = self._step
        step.count_microbatches(batches, self._model_config.sequence_cost)
        objective = policy_objective(
            self._config.trainer.loss,
            self._policy,
            temperature=self._config.rollout.temperature,
            vocabulary=self._vocabulary,
            version=step.version,
            stalenesses=len(step.sums.max_abs_diff),
        )
        filler = step.packer.filler()
        for part in self._executor.accumulate(batches, objective, filler=filler, verify=self._verifying):
            if self._place.answers:
                step.sums.add(part)

    def supervised_step(self, sequences: Sequence[tuple[Int32Array, npt.NDArray[np.bool_]]]) -> float:
        """One update on the cross entropy of the masked-in tokens: (token ids int32[N], mask bool[N]) per sequence.

        Returns the mean over this step's tokens of all ranks, before the update; the mask of a first token is
        of no effect. Routing is native.
        """
        from async_rl.trainer.objective import cross_entropy

        samples = [plain_sample(f"sequence {index}", ids, mask[1:]) for index, (ids, mask) in enumerate(sequences)]
        tokens = self._sum_over_data(tokens=sum(int(s.loss_mask.sum()) for s in samples))["tokens"]
        if not tokens:
            return 0.0

        packer = self._packer(replay=False)
        self._executor.zero_gradients()
        batches = packer.add(samples) + packer.flush()
        parts = self._executor.accumulate(batches, cross_entropy(self._vocabulary), filler=packer.filler())
        self._executor.finish_gradients(tokens)
        self._optimizer.step()
        mine = torch.tensor(sum(parts) if self._place.answers else 0.0, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(mine)
        return float(mine) / tokens

    def prepare(self, groups: Sequence[Group], *, oldest_version: int) -> None:
        """What has to be known of groups before their update, under the weights of now: for R2, the experts that the
        trainer's own router chooses; where the loss needs them, log-probs under the proximal and the reference policy.

        ``accumulate`` does this itself for groups that have not been prepared. Call it first, with the groups of all
        updates of a training step, so that later updates use what was before the first.
        """
        fresh = [group for group in groups if group.group_id not in self._prepared]
        owned = [(group.group_id, view) for group in fresh for view in self._views(group, oldest_version)]
        samples = self._with_passes([view for _, view in owned])
        self._prepared |= {group.group_id: [] for group in fresh}
        for (group_id, _), sample in zip(owned, samples, strict=True):
            self._prepared[group_id].append(sample)

    def _with_passes(self, samples: list[Sample]) -> list[Sample]:
        """The samples with what passes over them find, and their routing checked."""
        replay, loss = self._config.trainer.router_replay, self._config.trainer.loss
        with_pass = replay == "R2" or loss.proximal == "recompute" or loss.kl != "none"
        # All ranks make a pass if any has something to pass over: the others' part of it is padding.
        needed = with_pass and self._largest(len(samples), torch.distributed.group.WORLD) > 0
        if needed and replay == "R2":
            routed_experts = self.native_routing([sample.token_ids for sample in samples])
            samples = [sample.with_routed_experts(rows) for sample, rows in zip(samples, routed_experts, strict=True)]
        if replay != "off":
            for sample in samples:
                self._check_routing(sample)
        if needed and loss.proximal == "recompute":
            found = self._logprobs_of(samples)
            samples = [sample.with_logprobs(proximal=values) for sample, values in zip(samples, found, strict=True)]
        if needed and loss.kl != "none":
            with self._reference_weights():
                found = self._logprobs_of(samples)
            samples = [sample.with_logprobs(reference=values) for sample, values in zip(samples, found, strict=True)]
        return samples

    def _logprobs_of(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """float32[N-1] of each, computed as in training: with its routing and at the sampling temperature."""
        spec = self._model_config.routing_spec
        routed_experts = None
        if spec is not None and self._config.trainer.router_replay != "off":
            absent = np.int32(packing.NO_ROUTING)
            shape = (spec.num_moe_layers, spec.top_k)
            routed_experts = [
                np.full((s.positions, *shape), absent) if s.routed_experts is None else s.routed_experts
                for s in samples
            ]
        return self.logprobs([s.token_ids for s in samples], routed_experts, self._config.rollout.temperature)

    def _copy_of_parameters(self) -> list[torch.Tensor]:
        """In main memory."""
        return [parameter.detach().cpu().clone() for chunk in self._chunks for parameter in chunk.parameters()]

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Within it, the model is the checkpoint that the run started from."""
        assert self._reference is not None
        now = self._copy_of_parameters()
        self._load_parameters(self._reference)
        try:
            yield
        finally:
            self._load_parameters(now)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _load_parameters(self, values: Sequence[torch.Tensor]) -> None:
        parameters = (parameter for chunk in self._chunks for parameter in chunk.parameters())
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)

    def _views(self, group: Group, oldest_version: int) -> list[Sample]:
        """What a group is trained on, advantages apart."""
        exact = self._config.async_training.partial_rollout.routing == "exact"
        return [
            view
            for trajectory in group.trajectories
            for view in packing.samples_of(trajectory, oldest_version=oldest_version, per_segment=exact)
        ]

    def _with_advantages(self, groups: Sequence[Group]) -> list[Sample]:
        """The prepared samples of these groups, each token with its advantage and weight; they are forgotten here."""
        settings, limit = self._config.trainer.loss, self._config.rollout.max_response_tokens
        views = [view for group in groups for view in self._prepared.pop(group.group_id)]
        # Of each response: how many tokens of it count, in all its views.
        tokens = dict.fromkeys((t.trajectory_id for group in groups for t in group.trajectories), 0)
        for view in views:
            tokens[view.trajectory_id] += int(view.loss_mask.sum())
        values = [group_advantages(group.group_id, group.rewards, self._estimator).tolist() for group in groups]
        advantages = [value for group in values for value in group]
        if settings.needs_batch_statistics:
            names = ("count", "sum", "squares")
            sums = dict(zip(names, batch_sums(advantages, list(tokens.values())), strict=True))
            total = self._sum_over_data(**sums)
            advantages = batch_normalized(advantages, (total["count"], total["sum"], total["squares"]))
        of = dict(zip(tokens, advantages, strict=True))
        return [
            view.with_advantages(of[view.trajectory_id]).with_weight(
                losses.token_weight(settings.aggregation, tokens[view.trajectory_id], limit)
            )
            for view in views
        ]

    # ---- asking the model ----

    def logprobs(
        self,
        sequences: Sequence[Int32Array],
        routed_experts: Sequence[ExpertIds | Int32Array] | None = None,
        temperature: float = 1.0,
    ) -> list[Float32Array]:
        """Log-probs float32[N-1] of tokens 1..N-1 of each sequence int32[N], without touching any state.

        routed_experts: [N-1, L, K] per sequence, replayed; rows of packing.NO_ROUTING are routed natively, as all
        are without it.
        """
        batches, filler = self._probe_batches(sequences, routed_experts)

        def collect(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            values, _entropy = token_logprobs(logits, tensors["labels"], temperature, self._vocabulary)
            return values.sum(), {0: values.cpu().numpy()}

        kept = self._executor.forward(batches, collect, filler=filler)
        parts = kept if self._place.answers else [{}] * len(batches)
        whole = self._assembled(batches, parts, self._context_rows, np.zeros((1,), np.float32))
        return [part[:, 0] for part in packing.unpack(whole, batches, len(sequences))]

    def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """The experts that the routers choose now: int32[N-1, L, K] of each sequence int32[N]."""
        spec = self._model_config.routing_spec
        batches, filler = self._probe_batches(sequences, None)
        if spec is None:
            return [np.zeros((max(len(ids) - 1, 0), 0, 0), np.int32) for ids in sequences]
        parts = self._executor.record_routing(batches, filler=filler)
        row = np.zeros((spec.num_moe_layers, spec.top_k), np.int32)
        return packing.unpack(self._assembled(batches, parts, self._router_rows, row), batches, len(sequences))

    def fingerprints(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds | Int32Array] | None = None
    ) -> list[Float32Array]:
        """Of the residual stream, float32[layers + 1, N-1, WIDTH] of each sequence as in ``weights.fingerprint``;
        routed_experts as in ``logprobs``."""
        batches, filler = self._probe_batches(sequences, routed_experts)
        parts: list[dict[int, Float32Array]] = [{} for _ in batches]
        with FingerprintHooks([chunk.module for chunk in self._chunks]) as hooks:

            def note(index: int, _chunk: int) -> None:
                taken = hooks.take()
                if index < len(parts):
                    parts[index] |= taken

            self._executor.forward(batches, filler=filler, watch=note)
        row = np.zeros((self._model_config.num_layers + 1, WIDTH), np.float32)
        whole = packing.unpack(self._assembled(batches, parts, self._router_rows, row), batches, len(sequences))
        return [part.swapaxes(0, 1) for part in whole]

    def weights(self) -> Weights:
        """The live weights under Hugging Face names, tensor by tensor, on rank 0. Every rank iterates it in step."""
        from async_rl.trainer.export import Weights

        modules = [chunk.module for chunk in self._chunks]
        return Weights(modules, self._model_config, self._place, platform.layout(self._device))

    def weight_source(self) -> WeightSource:
        """The same for a push. The first call imports part of vLLM (seconds)."""
        from async_rl.weights.vllm.source import StreamedSource

        return StreamedSource(self.weights())

    # ---- what is kept ----

    def save_hf(self, folder: Path) -> None:
        """Write a checkpoint folder like the one that was loaded: weights, config and tokenizer files. Rank 0 writes.
        Layers that predict further tokens are not trained, and stay as they were.
        """
        from async_rl.trainer.export import write_hf

        write_hf(self.weights(), folder, like=self._config.model.path, model=self._model_config, place=self._place)

    def save(self, folder: Path) -> None:
        """Write model, optimizer, schedule and random state into ``folder``. Every rank writes its part, and returns
        when all are in place. ``trainer.checkpoint`` makes the folder, and a whole checkpoint of it."""
        self._checkpoint.save(folder, updates=self._steps)

    def load(self, path: Path, *, optimizer: bool = True) -> None:
        """Go on from the checkpoint ``path``, which a trainer in any layout may have written.

        optimizer: its state too, without which only the weights are taken. Raises CheckpointError where the checkpoint
        is not of this model.
        """
        if optimizer:
            self._steps = self._checkpoint.load(path)
        else:
            self._checkpoint.load_weights(path)

    def close(self) -> None:
        """Leave the process groups. The Trainer is unusable afterwards."""
        platform.close_distributed()

    # ---- odds and ends ----

    @property
    def _verifying(self) -> bool:
        return self._steps < self._config.trainer.verify_replay_steps and self._model_config.routing_spec is not None

    def _check_routing(self, sample: Sample) -> None:
        """Raise ReplayError unless the sample has no routing, or such as this model can execute."""
        from async_rl.trainer.megatron.replay import check_rows

        if sample.routed_experts is None:
            return
        spec = self._model_config.routing_spec
        if spec is None:
            raise ReplayError(f"{sample.name}: has routing, but {self._config.model.path} has no MoE layer")
        check_rows(sample.name, sample.routed_experts, rows=sample.positions, spec=spec)

    def _packer(self, *, replay: bool | None = None) -> Packer:
        """``replay``: carry the samples' routing; by default as trainer.router_replay says."""
        settings = self._config.trainer
        if replay is None:
            replay = settings.router_replay != "off"
        return Packer(
            settings.tokens_per_microbatch,
            self._model_config.routing_spec if replay else None,
            sequence_multiple=parallel.sequence_multiple(settings.parallel),
            multiple=parallel.microbatch_multiple(settings.parallel, settings.microbatch_multiple),
        )

    def _probe_batches(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds | Int32Array] | None
    ) -> tuple[list[Microbatch], Microbatch]:
        """Plain sequences, with ``routed_experts`` to replay where given; and a filler."""
        samples = [plain_sample(f"sequence {index}", ids) for index, ids in enumerate(sequences)]
        if routed_experts is not None:
            samples = [sample.with_routed_experts(rows) for sample, rows in zip(samples, routed_experts, strict=True)]
            for sample in samples:
                self._check_routing(sample)
        packer = self._packer(replay=routed_experts is not None)
        return packer.add(samples) + packer.flush(), packer.filler()

    def _context_rows(self, batch: Microbatch) -> Int64Array:
        return parallel.context_rows(batch.cu_seqlens, self._place)

    def _router_rows(self, batch: Microbatch) -> Int64Array:
        return parallel.replayed(batch.cu_seqlens, (), self._model_config.num_layers, self._place)[0]

    def _assembled(
        self,
        batches: Sequence[Microbatch],
        parts: Sequence[Mapping[int, npt.NDArray[Any]]],
        rows: Callable[[Microbatch], Int64Array],
        zero: npt.NDArray[Scalar],
    ) -> list[npt.NDArray[Scalar]]:
        """[T, *zero.shape] of each microbatch on every rank, from what the ranks of this replica have of it.

        parts: of each microbatch, column (first axis of ``zero``) -> values at the positions that ``rows`` gives. No
        two ranks have the same; ``zero`` stands where none has anything.
        """
        if not batches:
            return []
        starts = np.cumsum([0, *(len(batch) for batch in batches)])
        whole = np.broadcast_to(zero, (int(starts[-1]), *zero.shape)).copy()
        for batch, start, columns in zip(batches, starts, parts, strict=False):
            for column, values in columns.items():
                whole[start + rows(batch), column] = values
        summed = torch.from_numpy(whole).to(self._device)
        torch.distributed.all_reduce(summed, group=self._replica)
        return np.split(summed.cpu().numpy(), starts[1:-1])

    def _largest(self, value: float, group: torch.distributed.ProcessGroup) -> float:
        """Of what the ranks of ``group`` have."""
        largest = torch.tensor(value, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        return float(largest)

    def _largest_over_mean(self, total: float, mine: float) -> float:
        """Of what the data-parallel ranks have; 1 where all have the same."""
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group()
        return self._largest(mine, group) * group.size() / total if total else 1.0

    def _sum_over_data(self, **values: float) -> dict[str, float]:
        """Sums over the data-parallel ranks, exact for counts below 2**53."""
        from megatron.core import parallel_state

        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(flat, group=parallel_state.get_data_parallel_group())
        return dict(zip(values, flat.tolist(), strict=True))
