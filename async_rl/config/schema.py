"""The settings of a run: one typed tree, in which each field has its sentence and unknown keys are rejected.

The sentences are the user's reference: --help and docs/reference/settings.md print them. Names follow verl's
fully-async recipe where it has one. ``checks`` refuses combinations that cannot work, ``doctor`` what this machine or
the model cannot do; ``loading`` reads the tree from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from async_rl.config.checks import check_combinations
from async_rl.config.fields import Dtype, FunctionName, NonNegative, PathName, Section
from async_rl.config.inputs import (
    HELD_OUT,
    TRAIN,
    DataSection,
    EvalSection,
    EvalSetSection,
    ModelSection,
    RewardSection,
    RowSampling,
    SourceSection,
    Terms,
)
from async_rl.config.operation import (
    CheckpointSection,
    ClusterSection,
    DebugSection,
    MetricsSection,
    QueueSection,
    RecoverySection,
    ResourcesSection,
    SyncSection,
    WatchdogSection,
)
from async_rl.config.rollouts import AGENT, AsyncTrainingSection, RolloutSection, agent_section
from async_rl.config.training import TrainerSection


class RunConfig(Section):
    """All settings of one run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is <runs>/<name>."""
    runs: PathName = Path("runs")
    """Folder that holds the run folders."""
    seed: NonNegative = 0
    """Seed of everything random in the run: the order of prompts, sampling, the canary."""
    prepare: FunctionName | None = None
    """A module:function called as f(config: RunConfig) before anything starts, which may create model and dataset."""
    model: ModelSection
    data: DataSection
    reward: RewardSection = RewardSection()
    async_training: AsyncTrainingSection = AsyncTrainingSection()
    rollout: RolloutSection = RolloutSection()
    trainer: TrainerSection = TrainerSection()
    queue: QueueSection = QueueSection()
    sync: SyncSection = SyncSection()
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
    watchdog: WatchdogSection = WatchdogSection()
    eval: EvalSection = EvalSection()
    metrics: MetricsSection = MetricsSection()
    debug: DebugSection = DebugSection()
    resources: ResourcesSection = ResourcesSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def required_groups(self) -> int:
        """Groups that one training step consumes."""
        return self.trainer.groups_per_step * self.async_training.require_batches

    @property
    def eval_sets(self) -> dict[str, EvalSetSection]:
        """Every set to evaluate on, by name: the held-out prompts, if there are any, and eval.sets."""
        if self.data.eval is None:
            return self.eval.sets
        held_out = EvalSetSection(path=self.data.eval, temperature=0.0, limit=self.eval.n)
        return {HELD_OUT: held_out, **self.eval.sets}

    def terms(self, source: str, fields: Mapping[str, Any] = MappingProxyType({})) -> Terms:
        """Return what holds in training for a prompt with these fields, of a source of data.sources; "" for data.train.

        Without ``fields`` that is what holds for all rows of the source that say nothing else.
        """
        own = self.data.sources.get(source)
        terms = self._terms(source or TRAIN, own)
        if own is not None and own.temperature is not None:
            terms = replace(terms, temperature=own.temperature)
        said = fields.get(self.data.sampling_field) if self.data.sampling_field is not None else None
        if said is None:
            return terms
        row = RowSampling.model_validate(said)
        return replace(
            terms,
            temperature=row.temperature or terms.temperature,
            max_response_tokens=min(row.max_response_tokens or terms.max_response_tokens, terms.max_response_tokens),
            stop=(*terms.stop, *row.stop),
            stop_token_ids=(*terms.stop_token_ids, *row.stop_token_ids),
        )

    def eval_terms(self, name: str) -> Terms:
        """Return what holds for the problems of an evaluation set."""
        return self._terms(name, self.eval_sets[name])

    def _terms(self, name: str, own: SourceSection | EvalSetSection | None) -> Terms:
        limit, environment = (None, None) if own is None else (own.max_response_tokens, own.environment)
        stop, stop_token_ids = ([], []) if own is None else (own.stop, own.stop_token_ids)
        rollout, agent = self.rollout, None if own is None else own.agent
        section = AGENT if rollout.agent.given else None
        if agent is not None:
            section = agent_section(agent)
        return Terms(
            name,
            limit or rollout.max_response_tokens,
            None if section is not None else environment or rollout.environment.function,
            rollout.temperature,
            (*rollout.stop, *stop),
            (*rollout.stop_token_ids, *stop_token_ids),
            section,
        )

    @property
    def uses_stop_strings(self) -> bool:
        """Whether responses to some prompts may have a stop string."""
        of_sources = (source.stop for source in self.data.sources.values())
        of_sets = (each.stop for each in self.eval.sets.values())
        return any([self.rollout.stop, self.data.sampling_field, *of_sources, *of_sets])

    @property
    def longest_response(self) -> int:
        """The most tokens of a response that engines have room for, in training or an evaluation."""
        limits = [self.eval_terms(name).max_response_tokens for name in self.eval_sets]
        return max([self.rollout.max_response_tokens, *limits])

    @property
    def needed_replicas(self) -> int:
        """Replicas without which the run fails; see recovery.min_replicas."""
        return self.recovery.min_replicas or (self.rollout.replica_range.min if self.rollout.elastic else 1)

    @property
    def streams(self) -> bool:
        """Whether a step starts before its batch is complete; see trainer.streaming."""
        one_batch = self.async_training.require_batches == 1
        loss, pipelined = self.trainer.loss, self.trainer.parallel.pp > 1
        # The reference's weights are brought to the device once a step, and passes over few groups idle in a pipeline.
        with_pass = self.trainer.router_replay == "R2" or loss.proximal == "recompute"
        waits = loss.needs_batch_statistics or loss.kl != "none" or (pipelined and with_pass)
        return self.trainer.streaming and one_batch and not waits

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.runs / self.name

    @property
    def sync_backend(self) -> Literal["shm", "object_store", "nccl"]:
        """How weights are transferred: sync.backend, with auto resolved for this process's environment."""
        if self.sync.backend != "auto":
            return self.sync.backend
        return "shm" if self.cluster.joined_address is None else "object_store"

    @property
    def engine_dtype(self) -> Dtype:
        """Parameter type of the rollout engines; what rollout.quantization says is made of it."""
        return self.rollout.dtype or self.model.dtype

    @property
    def rank_gpus(self) -> float:
        """GPUs of each trainer rank, in a run on GPUs."""
        return 0.5 if self.resources.share_gpu else 1

    @property
    def engine_gpus(self) -> float:
        """GPUs of each rollout engine on each of its hosts, in a run on GPUs."""
        rollout = self.rollout
        return 0.5 if self.resources.share_gpu else rollout.engine_ranks / rollout.hosts_per_engine

    @property
    def engine_share(self) -> float:
        """Share of the memory of the trainer's GPU that an engine has; 0 where none is on it."""
        return self.rollout.gpu_memory_utilization if self.resources.share_gpu else 0.0

    @property
    def kv_value_bytes(self) -> int:
        """Bytes of one value in an engine's cache of keys and values."""
        if self.rollout.kv_cache_dtype is not None:
            return 1
        return 4 if self.engine_dtype == "float32" else 2

    @model_validator(mode="after")
    def _check_combinations(self) -> RunConfig:
        check_combinations(self)
        return self
