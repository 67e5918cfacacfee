"""The settings of a run in operation: queue, weight sync, checkpoints, recovery, metrics, machines."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from async_rl.config.fields import (
    NonNegative,
    NonNegativeFloat,
    PartName,
    PathName,
    Positive,
    PositiveFloat,
    Section,
    whole,
)


class RedisSection(Section):
    """The Redis server of queue.backend redis."""

    url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://[^@]*$")] = "redis://127.0.0.1:6379/0"
    """URL of server and database, rediss:// for TLS; it is saved in the run folder, so credentials have settings of
    their own."""
    username: str | None = None
    """User of the server's access control list; null for its default user."""
    password_file: PathName | None = None
    """File that contains the password."""
    ca_file: PathName | None = None
    """File of the CA certificates that the server's certificate is checked against; null for those of this machine."""


class QueueSection(Section):
    """The queue of finished groups."""

    backend: Literal["memory", "redis"] = "memory"
    """Where finished groups and the queue's journal are: in the cluster and the run folder (memory), or in Redis, so
    that they outlive both."""
    redis: RedisSection = RedisSection()
    max_groups: Positive | None = None
    """Most groups that are queued and leased; null for as many as the staleness budget admits."""
    max_bytes: Positive = 2 * 2**30
    """Payload bytes of queued and leased groups above which workers wait; the groups of one training step are admitted
    whatever their size."""
    copies: Annotated[int, BeforeValidator(whole), Field(ge=1, le=2)] = 1
    """Hosts of the cluster that have each finished group: 2 for a copy on a second one, so that the loss of one host
    loses none; the copies take as much memory again, which max_bytes does not count."""


class DeltaSection(Section):
    """Weight syncs that send what has changed, with sync.backend object_store."""

    full_every: Positive = 1
    """One weight sync of so many sends all weights, the others the elements whose bits have changed: 1 for all weights
    each time. A host without the weights of the sync before gets all. Where sync.backend auto stands for shm it changes
    nothing."""
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Largest share of the weights' bytes that the changed elements may take: above it all weights are sent."""


class SyncSection(Section):
    """The weight sync from trainer to engines."""

    backend: Literal["auto", "shm", "object_store", "nccl"] = "auto"
    """How weights are transferred: through shared memory of one host (shm), through Ray's object store to any number of
    hosts, or by NCCL from GPU to GPU; auto for object_store if the run joins a cluster, else shm."""
    canary_tolerance: PositiveFloat | Literal["auto"] | None = "auto"
    """Largest difference of log-probs between engine and trainer on a token of the canary; the mean may be a tenth of
    it. auto for three times what the run's first comparison measures, at least 1e-4 in float32, 0.5 in bfloat16 and 1
    where engines compute in fp8; null for these alone. With auto a single token may be off by up to 1e-3, 2.5 or 15
    while the mean is not and no layer stands out."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that a weight sync may take; then engines that do not answer are replaced, and if all answer, the run
    fails."""
    # At 50 GB/s it takes 10 ms, long against the tens of microseconds that each message costs, also where sixteen ranks
    # share it; and it is little beside the GiB that vLLM's NCCL transfer broadcasts at a time.
    gather_bucket_bytes: Positive = 512 * 2**20
    """Most bytes of weights that the trainer's ranks bring to rank 0 at a time, which it holds beside its own; a larger
    parameter comes alone."""
    senders: Literal["one", "stages"] = "one"
    """Which trainer ranks send with sync.backend nccl: rank 0 all weights (one), or the first rank of each pipeline
    stage those of its stage, one stage after the other, so that no rank gathers or sends more than its stage has."""
    delta: DeltaSection = DeltaSection()
    rolling: bool = False
    """Whether to sync one replica after the other, so that generation never stops on all; not with sync.backend
    nccl."""


class CheckpointSection(Section):
    """The trainer's checkpoints."""

    every: NonNegative = 0
    """Training steps between checkpoints; 0 for none by steps. Without any, only the model is exported at the end."""
    every_s: NonNegativeFloat = 0.0
    """Seconds between checkpoints, each at the end of a step; 0 for none by time."""
    on_sigterm_s: NonNegativeFloat = 20.0
    """Seconds that a run with checkpoints has for one more after SIGTERM, before it ends without; 0 for none."""
    keep: Positive = 2
    """Number of newest checkpoints to keep."""
    keep_best: PartName | None = None
    """Evaluation set, one of eval.sets or held_out, by which the best checkpoint is kept beside the newest ones, as
    best-step-...; null for none. It is the one of the highest mean reward among those of steps that were evaluated."""

    @property
    def periodic(self) -> bool:
        """Whether checkpoints are written without being asked for."""
        return bool(self.every or self.every_s)


class RecoverySection(Section):
    """Restarts of processes that died."""

    max_restarts: NonNegative = 3
    """How many restarts to allow per process (each rollout worker, queue, trainer) within recovery.period_s. After them
    the run fails, or continues without the rollout worker as recovery.min_replicas says."""
    min_replicas: Positive | None = None
    """Rollout workers without which a run fails; null for rollout.replicas.min, or 1 where that is not set. While at
    least so many others have restarts left, a worker that has none is tried again only once its first restart is
    recovery.period_s ago. With rollout.replicas.min, the run also fails when fewer have had a host for
    watchdog.abort_s."""
    period_s: PositiveFloat = 3600.0
    """Period of recovery.max_restarts, in seconds; the queue's restarts are counted over the whole run."""
    backoff_s: NonNegativeFloat = 1.0
    """Seconds to wait before a restart, doubled with each further one in the period."""


class WatchdogSection(Section):
    """What happens when a run stalls."""

    stall_s: PositiveFloat = 60.0
    """Seconds without progress after which the log names what each process waits for."""
    abort_s: PositiveFloat = 1800.0
    """Seconds without progress after which the run fails, with the stacks of every process in its log folder."""


LoggerName = Literal["tensorboard", "wandb"]


class MetricsSection(Section):
    """Where metrics and samples go."""

    host: str | None = None
    """Address on which each process serves /metrics, 0.0.0.0 for all interfaces; null for 127.0.0.1 if the run is on
    one host, and on several for each host's own address in the cluster's network, which has no access control."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to use, counting upwards by process; 0 lets the system choose free ones."""
    engine: bool = True
    """Whether to serve the engine's own metrics as well."""
    samples_per_step: NonNegative = 2
    """Trajectories per step written to samples.jsonl in readable form."""
    sample_characters: Positive = 16_384
    """Most characters of a sample's prompt and of its response; of a longer one beginning and end are written. Where a
    rollout has turns, as many again for all of its prompts and for all of its turns, but 80 for each."""
    samples_per_eval: NonNegative = 2
    """Responses per evaluation and set written to eval_samples.jsonl, one each of the set's first problems."""
    samples_bytes: Positive = 256 * 2**20
    """Most bytes of samples.jsonl and its older parts together, and of eval_samples.jsonl likewise; the oldest samples
    are removed."""
    loggers: list[LoggerName] = Field(default_factory=list)
    """Further outputs for each step's row: `tensorboard`, `wandb`."""
    timeline_bytes: NonNegative = 64 * 2**20
    """Most bytes that each process keeps of its latest spans for the report's timeline; 0 for none."""


class DebugSection(Section):
    """Extra output for debugging."""

    dump_trajectories: NonNegative = 0
    """Number of last trained groups to keep as wire-format files in the run folder."""


class ResourcesSection(Section):
    """The processor cores and devices of a run."""

    pin_cores: bool = True
    """Whether to pin each engine core and each trainer rank to cores of its own, on CPU and if there are enough."""
    numa_bind: bool = True
    """Whether to bind engines and trainer ranks to the cores of the NUMA node of their GPUs, where hosts have several
    nodes."""
    engine_threads: Positive = 1
    """Compute threads per engine on CPU."""
    trainer_threads: Positive = 1
    """Compute threads per trainer rank on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of engines and trainer; auto for cuda if there is a GPU."""
    share_gpu: bool = False
    """Whether the trainer and the engine compute on one GPU, in a run with one rank and one engine of vLLM. The engine
    has rollout.gpu_memory_utilization of its memory, keys and values rollout.kv_cache_bytes of that; the trainer may
    take what is left, and no more. Both compute at once, each slower than on a GPU of its own."""


class ClusterSection(Section):
    """The Ray cluster of a run over several hosts."""

    address: str | None = None
    """Address of the Ray cluster to join, for example 10.0.0.1:6379, or auto for the one of this host; null for
    RAY_ADDRESS if it is set, else for a cluster that the run starts on this host and ends."""
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@:-]{1,15}$")] | None = None
    """Network interface of the trainer's ranks, and of engines over several hosts, on every host, for example eth0;
    null for the one with the route to rank 0."""
    shared_fs: bool = True
    """Whether all hosts have the folder of the runs. false: the host on which the run is started has it alone, and what
    processes on others write reaches it through Ray."""
    local_dir: PathName | None = None
    """Folder on each host for what its processes write until it has reached the run folder, with cluster.shared_fs
    false; null for one in the host's folder for temporary files."""
    run_host: str | None = None
    """Address of the host that has the run folder, with cluster.shared_fs false; each start of a run fills it in."""

    @property
    def joined_address(self) -> str | None:
        """Address of the cluster that the run joins; None if it starts its own on this host."""
        return self.address or os.environ.get("RAY_ADDRESS") or None
