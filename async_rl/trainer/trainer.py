"""One Megatron rank, without Ray: groups in, an optimizer update and a StepReport out; weights out to whoever asks.

A step reads top to bottom in ``accumulate`` and ``finish_step``: (R2: record routing,) advantages, packing, forward and
backward under Megatron's own schedule with routing replayed; then the global counts, update, metrics. Knows the other
modules of this room, ``weights`` and ``model_config``; knows neither queue nor engine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from async_rl.config import RunConfig
from async_rl.config_file import to_yaml
from async_rl.errors import CheckpointError, ReplayError, TrainerError
from async_rl.model_config import check_run, checkpoint_shards, read_model_config
from async_rl.process import release_freed_memory
from async_rl.trainer import losses, packing, parallel, platform
from async_rl.trainer.advantages import (
    batch_normalized,
    batch_sums,
    group_advantages,
    load_advantages,
)
from async_rl.trainer.fingerprint import FingerprintHooks
from async_rl.trainer.logprobs import token_logprobs
from async_rl.trainer.losses import sequence_sums
from async_rl.trainer.packing import Microbatch, Packer, Sample
from async_rl.trainer.parallel import Int64Array, Place
from async_rl.trainer.policy_sums import PolicySums, policy_sums
from async_rl.trainer.report import StepReport, step_report
from async_rl.trainer.writers import threads_write
from async_rl.types import ExpertIds, Float32Array, Group, Int32Array
from async_rl.weights import names
from async_rl.weights.fingerprint import WIDTH

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource

    from async_rl.trainer.executor import LossFunction, Tensors
    from async_rl.trainer.export import Weights

Scalar = TypeVar("Scalar", bound=np.generic)

# Size of one *.safetensors file of an export: what transformers writes too.
SHARD_BYTES = 5 * 10**9


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

        from async_rl.trainer import megatron
        from async_rl.trainer.executor import Executor
        from async_rl.trainer.replay import RoutingReplay

        self._chunks = megatron.build(self._config, self._model_config, self._device, self._place)
        replay = RoutingReplay([chunk.module for chunk in self._chunks], self._model_config, self._place)
        self._executor = Executor(self._chunks, replay, self._place, self._device)
        self._optimizer = platform.optimizer(self._device, self._chunks, self._config.trainer.optimizer)
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        self._vocabulary = tensor_group if tensor_group.size() > 1 else None
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
        self._step = _Step(version, oldest_version, sums, self._packer())

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Compute the microbatches that these groups of this rank fill; the rest waits for the next ones."""
        step = self._step
        _check_versions(groups, step.version)
        started = time.perf_counter()
        self.prepare(groups, oldest_version=step.oldest_version)
        started = _lap(step.seconds, "record_routing", started)
        samples = self._with_advantages(groups)
        step.count(groups, samples)
        batches = step.packer.add(samples)
        started = _lap(step.seconds, "prepare", started)
        self._forward_backward(batches)
        _lap(step.seconds, "forward_backward", started)

    def finish_step(self) -> StepReport:
        """Compute what is left, update the parameters, and report."""
        step = self._step
        started = time.perf_counter()
        self._forward_backward(step.packer.flush())
        started = _lap(step.seconds, "forward_backward", started)
        total = self._sum_over_data(**step.counts)
        divisor = losses.denominator(self._config.trainer.loss.aggregation, total["tokens"], total["sequences"])
        update = self._optimizer.no_update()
        step.sums.routing += torch.tensor(self._executor.take_disagreement(), dtype=torch.float64, device=self._device)
        if total["tokens"]:
            self._executor.finish_gradients(divisor)
            started = _lap(step.seconds, "forward_backward", started)
            update = self._optimizer.step()
            started = _lap(step.seconds, "optimizer", started)
            step.sums.all_reduce(torch.distributed.group.WORLD)
        self._steps += 1
        _lap(step.seconds, "metrics", started)
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
        step = self._step
        step.counts["microbatches"] += len(batches)
        step.counts["padding"] += sum(batch.padding for batch in batches)
        step.counts["positions"] += sum(len(batch) for batch in batches)
        cost = self._model_config.sequence_cost
        step.counts["cost"] += sum(cost(positions) for batch in batches for positions in batch.positions)
        step.counts["fallback"] += sum(packing.rows_without_routing(batch) for batch in batches)
        loss = self._policy_loss(step.version, len(step.sums.max_abs_diff))
        for part in self._executor.accumulate(batches, loss, filler=step.packer.filler(), verify=self._verifying):
            if self._place.answers:
                step.sums.add(part)

    def supervised_step(self, sequences: Sequence[tuple[Int32Array, npt.NDArray[np.bool_]]]) -> float:
        """One update on the cross entropy of the masked-in tokens: (token ids int32[N], mask bool[N]) per sequence.

        Returns the mean over this step's tokens of all ranks, before the update; the mask of a first token is
        of no effect. Routing is native.
        """
        samples = [_plain_sample(f"sequence {index}", ids, mask[1:]) for index, (ids, mask) in enumerate(sequences)]
        tokens = self._sum_over_data(tokens=sum(int(s.loss_mask.sum()) for s in samples))["tokens"]
        if not tokens:
            return 0.0

        def loss(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            logprobs, _entropy = token_logprobs(logits, tensors["labels"], group=self._vocabulary)
            summed = -torch.where(tensors["loss_mask"], logprobs, 0.0).sum()
            return summed, float(summed.detach())

        packer = self._packer(replay=False)
        self._executor.zero_gradients()
        parts = self._executor.accumulate(packer.add(samples) + packer.flush(), loss, filler=packer.filler())
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
            routing = self.native_routing([sample.token_ids for sample in samples])
            samples = [sample.with_routing(rows) for sample, rows in zip(samples, routing, strict=True)]
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
        spec = self._model_config.routing
        routing = None
        if spec is not None and self._config.trainer.router_replay != "off":
            absent = np.int32(packing.NO_ROUTING)
            shape = (spec.num_moe_layers, spec.top_k)
            routing = [np.full((s.positions, *shape), absent) if s.routing is None else s.routing for s in samples]
        return self.logprobs([s.token_ids for s in samples], routing, self._config.rollout.temperature)

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
        routing: Sequence[ExpertIds | Int32Array] | None = None,
        temperature: float = 1.0,
    ) -> list[Float32Array]:
        """Log-probs float32[N-1] of tokens 1..N-1 of each sequence int32[N], without touching any state.

        routing: [N-1, L, K] per sequence, replayed; rows of packing.NO_ROUTING are routed natively, as all
        are without it.
        """
        batches, filler = self._probe_batches(sequences, routing)

        def collect(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
            values, _entropy = token_logprobs(logits, tensors["labels"], temperature, self._vocabulary)
            return values.sum(), {0: values.cpu().numpy()}

        kept = self._executor.forward(batches, collect, filler=filler)
        parts = kept if self._place.answers else [{}] * len(batches)
        whole = self._assembled(batches, parts, self._context_rows, np.zeros((1,), np.float32))
        return [part[:, 0] for part in packing.unpack(whole, batches, len(sequences))]

    def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]:
        """The experts that the routers choose now: int32[N-1, L, K] of each sequence int32[N]."""
        spec = self._model_config.routing
        batches, filler = self._probe_batches(sequences, None)
        if spec is None:
            return [np.zeros((max(len(ids) - 1, 0), 0, 0), np.int32) for ids in sequences]
        parts = self._executor.record_routing(batches, filler=filler)
        row = np.zeros((spec.num_moe_layers, spec.top_k), np.int32)
        return packing.unpack(self._assembled(batches, parts, self._router_rows, row), batches, len(sequences))

    def fingerprints(
        self, sequences: Sequence[Int32Array], routing: Sequence[ExpertIds | Int32Array] | None = None
    ) -> list[Float32Array]:
        """Of the residual stream, float32[layers + 1, N-1, WIDTH] of each sequence as in ``weights.fingerprint``;
        routing as in ``logprobs``."""
        batches, filler = self._probe_batches(sequences, routing)
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
        from async_rl.weights.source import StreamedSource

        return StreamedSource(self.weights())

    def save_hf(self, folder: Path) -> None:
        """Write a checkpoint folder like the one that was loaded: weights, config and tokenizer files. Rank 0 writes.
        Layers that predict further tokens are not trained, and stay as they were.
        """
        weights = self.weights()
        if self._place.rank == 0:
            extra = names.extra_layers(self._model_config, checkpoint_shards(self._config.model.path))
            names.write_checkpoint(chain(weights, extra), folder, shard_bytes=SHARD_BYTES)
            for file in self._config.model.path.iterdir():
                if file.is_file() and ".safetensors" not in file.name:
                    shutil.copy2(file, folder / file.name)
        else:
            for _ in weights:  # gathering a parameter is a collective: take part in it
                pass
        torch.distributed.barrier()

    def save(self, folder: Path) -> None:
        """Write model, optimizer, schedule and random state into ``folder``, through Megatron's distributed
        checkpointing. Every rank writes its part, and returns when all are in place. ``trainer.checkpoint`` makes the
        folder, and a whole checkpoint of it."""
        from megatron.core import dist_checkpointing

        if self._place.rank == 0:
            (folder / "config.yaml").write_text(to_yaml(self._config))
        torch.distributed.barrier()
        with platform.cuda_means(self._device), threads_write():
            dist_checkpointing.save(self._sharded_state(loading=False), str(folder))
        release_freed_memory()  # the copies that were written; a trainer of 750 MiB grew by 8 % in some minutes
        torch.distributed.barrier()

    def load(self, path: Path, *, optimizer: bool = True) -> None:
        """Go on from the checkpoint ``path``, which a trainer in any layout may have written.

        optimizer: its state too, without which only the weights are taken. Raises CheckpointError where the checkpoint
        is not of this model.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException

        try:
            model = dist_checkpointing.load_common_state_dict(str(path))["model"]
            if model != asdict(self._model_config):
                differing = [key for key, value in asdict(self._model_config).items() if model.get(key) != value]
                raise ValueError(f"it is of a model with another {', '.join(differing)}")
            with platform.cuda_means(self._device):
                state = dist_checkpointing.load(self._sharded_state(loading=True, optimizer=optimizer), str(path))
        except (CheckpointingException, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit {self._config.model.path}: {' '.join(str(error).split())[:300]}"
            ) from error
        for number, chunk in enumerate(self._chunks):
            chunk.module.load_state_dict(state[f"model{number}"])
        if optimizer:
            self._optimizer.load_state(state["optimizer"])
            self._steps = state["updates"]
            torch.set_rng_state(state["rng"])

    def _sharded_state(self, *, loading: bool, optimizer: bool = True) -> dict[str, Any]:
        chunks: dict[str, Any] = {
            f"model{number}": chunk.module.sharded_state_dict() for number, chunk in enumerate(self._chunks)
        }
        if not optimizer:
            return chunks
        # Nothing draws random numbers in training; what one rank has is as good as what another has.
        rng = [torch.get_rng_state()]
        torch.distributed.broadcast_object_list(rng, src=0)
        return {
            **chunks,
            "optimizer": self._optimizer.sharded_state(chunks, loading=loading),
            "updates": self._steps,
            "rng": rng[0],
            "model": asdict(self._model_config),
        }

    def close(self) -> None:
        """Leave the process groups. The Trainer is unusable afterwards."""
        platform.close_distributed()

    # ---- one microbatch ----

    def _policy_loss(self, version: int, stalenesses: int) -> LossFunction:
        from megatron.core import parallel_state

        settings = self._config.trainer.loss
        temperature = self._config.rollout.temperature
        context = parallel_state.get_context_parallel_group()

        def loss(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, PolicySums]:
            current, entropy = token_logprobs(logits, tensors["labels"], temperature, self._vocabulary)
            mask, behaviour = tensors["loss_mask"], tensors["logprobs"]
            staleness = version - tensors["versions"].long()
            match settings.proximal:
                case "recompute":
                    proximal = tensors.get("proximal", behaviour)  # a microbatch of padding has none
                case "interpolate":
                    proximal = losses.interpolated_proximal(behaviour, current, staleness)
                case _:
                    proximal = behaviour
            tokens = losses.Tokens(
                current=current,
                behaviour=behaviour,
                proximal=proximal,
                advantages=tensors["advantages"],
                mask=mask,
                staleness=staleness,
                sequence_sum=sequence_sums(tensors["sequence"], mask, context),
            )
            value, clipped = losses.policy_loss(tokens, settings, self._policy, tensors.get("reference"))
            summed = (value * tensors["weights"]).sum()
            sums = policy_sums(
                loss=summed.detach(),
                current=current.detach(),
                behaviour=behaviour,
                entropy=entropy,
                clipped=clipped,
                staleness=staleness,
                resume_position=tensors["resume_position"].long(),
                mask=mask,
                stalenesses=stalenesses,
            )
            return summed, sums

        return loss

    # ---- odds and ends ----

    @property
    def _verifying(self) -> bool:
        return self._steps < self._config.trainer.verify_replay_steps and self._model_config.routing is not None

    def _check_routing(self, sample: Sample) -> None:
        """Raise ReplayError unless the sample has no routing, or such as this model can execute."""
        from async_rl.trainer.replay import check_rows

        if sample.routing is None:
            return
        spec = self._model_config.routing
        if spec is None:
            raise ReplayError(f"{sample.name}: has routing, but {self._config.model.path} has no MoE layer")
        check_rows(sample.name, sample.routing, rows=sample.positions, spec=spec)

    def _packer(self, *, replay: bool | None = None) -> Packer:
        """``replay``: carry the samples' routing; by default as trainer.router_replay says."""
        settings = self._config.trainer
        if replay is None:
            replay = settings.router_replay != "off"
        return Packer(
            settings.tokens_per_microbatch,
            self._model_config.routing if replay else None,
            sequence_multiple=parallel.sequence_multiple(settings.parallel),
            multiple=parallel.microbatch_multiple(settings.parallel, settings.microbatch_multiple),
        )

    def _probe_batches(
        self, sequences: Sequence[Int32Array], routing: Sequence[ExpertIds | Int32Array] | None
    ) -> tuple[list[Microbatch], Microbatch]:
        """Plain sequences, with ``routing`` to replay where given; and a filler."""
        samples = [_plain_sample(f"sequence {index}", ids) for index, ids in enumerate(sequences)]
        if routing is not None:
            samples = [sample.with_routing(rows) for sample, rows in zip(samples, routing, strict=True)]
            for sample in samples:
                self._check_routing(sample)
        packer = self._packer(replay=routing is not None)
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


# What a step counts of this rank's groups.
COUNTS = (
    "tokens",
    "sampled",
    "not_sampled",
    "sequences",
    "extra_positions",
    "groups",
    "trajectories",
    "microbatches",
    "fallback",
    "positions",
    "padding",
    "cost",
)


@dataclass(slots=True)
class _Step:
    """An update under way. counts: of this rank's groups."""

    version: int
    oldest_version: int
    sums: PolicySums
    packer: Packer
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, groups: Sequence[Group], samples: Sequence[Sample]) -> None:
        trajectories = [t for group in groups for t in group.trajectories]
        sampled = sum(int(t.sampled.sum()) for t in trajectories)
        views: dict[str, list[int]] = {}
        for sample in samples:
            views.setdefault(sample.trajectory_id, []).append(sample.positions)
        added = {
            "tokens": sum(int(sample.loss_mask.sum()) for sample in samples),
            "sampled": sampled,
            "not_sampled": sum(len(t.response_ids) for t in trajectories) - sampled,
            # The last view of a trajectory is all of it that is trained, the others are prefixes of that.
            "extra_positions": sum(sum(positions[:-1]) for positions in views.values()),
            "sequences": len(views),
            "groups": len(groups),
            "trajectories": len(trajectories),
        }
        for name, value in added.items():
            self.counts[name] += value


def _plain_sample(name: str, ids: Int32Array, mask: npt.NDArray[np.bool_] | None = None) -> Sample:
    """A sequence without behaviour: every token counts unless a mask bool[N-1] says otherwise."""
    positions = max(len(ids) - 1, 0)
    return Sample(
        name=name,
        trajectory_id=name,
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
    seconds[phase] = seconds.get(phase, 0.0) + now - started
    return now
