"""One typed tree of settings. Each field has its sentence; unknown keys are rejected. Knows only ``errors``.

The names follow verl's fully-async recipe where it has one. Combinations that can be judged without looking at the
machine or the model are refused here, the rest by ``doctor``; ``loading`` makes the tree from a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _possible(path: Path) -> Path:
    try:
        if b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise ValueError("no file can have such a name")


PathName = Annotated[Path, Field(strict=False), AfterValidator(_possible)]  # YAML has no paths; a string is one
RoutingPolicy = Literal["replace", "preserve", "exact"]
Dtype = Literal["float32", "bfloat16"]
RecomputeModule = Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
FunctionName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
EngineName = Annotated[str, Field(pattern=r"^(vllm|[\w.]+:\w+)$")]


class Section(BaseModel):
    """A node of the tree: frozen, no unknown keys, no infinities, and no "3" or true taken for 3."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    path: PathName
    """Hugging Face checkpoint folder: config.json, *.safetensors, tokenizer."""
    dtype: Dtype = "bfloat16"
    """Parameter type of the trainer, and of the engine unless rollout.dtype says otherwise."""
    trust_remote_code: bool = False
    """Allow code that comes with the checkpoint to run."""


class DataSection(Section):
    train: PathName
    """JSONL file, one prompt per line; the fields besides data.prompt_field are handed to the reward."""
    eval: PathName | None = None
    """JSONL file of held-out prompts; none switches evaluation off."""
    prompt_field: str = "prompt"
    """Name of the field that holds the prompt text."""
    max_prompt_tokens: Positive = 512
    """A longer prompt is a bad row."""
    on_bad_row: Literal["skip", "fail"] = "fail"
    """A malformed, empty or too long row is counted and reported with its line, or ends the run."""
    shuffle: bool = True
    """Shuffle the rows anew in each epoch, by the run's seed."""


class RewardSection(Section):
    function: FunctionName = "async_rl.rollout.rewards.text:exact_match"
    """module:function called as f(prompt: Prompt, response: str) -> float."""
    slow: bool = False
    """Run it in a thread off the event loop; for rewards that wait for something or compute for long."""
    timeout_s: PositiveFloat = 30.0
    """A slow reward that takes longer fails its group."""
    rate_limit: NonNegative = 0
    """Calls of a slow reward per reward.rate_period_s and replica; 0 is unlimited."""
    rate_period_s: PositiveFloat = 1.0
    """Period of reward.rate_limit, in seconds."""
    on_error: Literal["fail", "skip"] = "fail"
    """A reward that raises, times out or is not finite fails the run, or its group only (counted)."""


class PartialRolloutSection(Section):
    mode: Literal["resume", "in_flight", "drain"] = "resume"
    """At a push: abort, then re-prefill; pause in place and go on with the old KV cache; or finish first."""
    routing: RoutingPolicy = "replace"
    """Routing of a resumed generation: the resumed call's replaces the earlier one; earlier rows stay and only new ones
    are added; or each segment is trained with its own call's, at the price of computing prefixes again."""


class AsyncTrainingSection(Section):
    staleness_threshold: NonNegativeFloat = 0.5
    """Admission: how many more groups than a version window consumes may be outstanding, as a share."""
    max_staleness: NonNegative = 4
    """Hard bound: no token older than this many versions contributes a gradient."""
    on_stale: Literal["mask", "drop"] = "mask"
    """Tokens over the bound are masked one by one, or the group is dropped and its prompt issued again."""
    trigger_parameter_sync_step: Positive = 1
    """Training steps per weight push."""
    require_batches: Positive = 1
    """Mini-batches that must be ready before a training step starts; each is one optimizer update."""
    partial_rollout: PartialRolloutSection = PartialRolloutSection()


class EnvironmentSection(Section):
    function: FunctionName | None = None
    """module:function called as f(prompt: Prompt, turns: tuple[str, ...]) -> str | None when the policy has stopped:
    what it returns is appended and the policy goes on, None ends the response."""
    max_turns: Annotated[int, Field(ge=2, lt=2**63)] = 8
    """Turns of the policy in one response; it ends with the last of them."""
    timeout_s: PositiveFloat = 30.0
    """A call that takes longer has failed."""
    on_error: Literal["fail", "skip"] = "fail"
    """An environment that raises, times out or returns no text fails the run, or its group only (counted)."""


class RolloutSection(Section):
    replicas: Positive = 1
    """Rollout engines."""
    engine: EngineName = "vllm"
    """The engine that samples: vllm, or module:Class of one that has the methods of RolloutEngine."""
    dtype: Dtype | None = None
    """Parameter type of the engines where it is not the trainer's (model.dtype)."""
    return_routed_experts: bool = True
    """Have a MoE engine return which experts each token went to; R3 needs it."""
    n: Annotated[int, Field(ge=2, lt=2**63)] = 8
    """Responses per prompt."""
    max_response_tokens: Positive = 1024
    """Limit of a response, over all its segments."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; behaviour log-probs are of the distribution after it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; behaviour log-probs are of the distribution after it."""
    max_num_seqs: Positive = 128
    """Sequences that one engine decodes at once."""
    max_num_batched_tokens: Positive = 4096
    """Tokens of one engine step, prefill included."""
    kv_cache_bytes: Positive = 512 * 2**20
    """Size of one engine's KV cache on CPU; GPUs go by rollout.gpu_memory_utilization."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of a GPU's memory that one engine takes."""
    tensor_parallel_size: Positive = 1
    """GPUs per engine."""
    enforce_eager: bool = False
    """Skip compilation: the engine starts sooner and decodes slower."""
    group_timeout_s: PositiveFloat | None = None
    """A group that takes longer is handed in with the responses that are finished, or its prompt is issued again."""
    min_group_size: Annotated[int, Field(ge=2, lt=2**63)] | None = None
    """Finished responses with which a group may be handed in after rollout.group_timeout_s; by default all n."""
    max_attempts: Positive = 3
    """Times that a prompt is issued whose group takes longer than rollout.group_timeout_s, before it is given up."""
    environment: EnvironmentSection = EnvironmentSection()


class ParallelSection(Section):
    dp: Positive = 1
    """Data-parallel ranks."""
    tp: Positive = 1
    """Tensor-parallel size."""
    ep: Positive = 1
    """Expert-parallel size."""
    etp: Positive = 1
    """Tensor-parallel size within an expert."""
    pp: Positive = 1
    """Pipeline-parallel size."""
    vpp: Positive = 1
    """Virtual pipeline stages per pipeline rank."""
    cp: Positive = 1
    """Context-parallel size."""


class OptimizerSection(Section):
    lr: PositiveFloat = 1e-6
    """Learning rate after warm-up."""
    warmup_steps: NonNegative = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after warm-up: stay, or fall to trainer.optimizer.min_lr."""
    decay_steps: Positive | None = None
    """Optimizer steps, warm-up included, after which it has fallen; needed unless the schedule is constant."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate that it falls to, and stays at."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first decay rate."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second decay rate."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip_grad: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""


class ImportanceSection(Section):
    level: Literal["off", "token", "sequence"] = "off"
    """Weigh the loss by proximal over behaviour policy (current over behaviour with policy reinforce): no, token by
    token, or by the product over a sequence."""
    mode: Literal["plain", "truncate", "mask"] = "truncate"
    """Take the weight as it is, at most importance.high, or 0 outside of importance.low to importance.high."""
    low: NonNegativeFloat = 0.5
    """Lower end of the weights that are kept (mode mask)."""
    high: PositiveFloat = 2.0
    """Upper end of the weights."""


class LossSection(Section):
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the importance ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """Upper clip of the importance ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio where the advantage is negative (dual clip; ppo and gspo); none is no bound."""
    policy: Literal["ppo", "gspo", "cispo", "reinforce"] | FunctionName = "ppo"
    """What is clipped; or module:function called as f(tokens: Tokens, settings: LossSection), which returns a loss for
    each token."""
    proximal: Literal["behaviour", "recompute", "interpolate"] = "behaviour"
    """The policy that the ratio starts from: the one that sampled, the trainer's at the start of the step (one more
    pass), or one between the two by staleness (no pass)."""
    importance: ImportanceSection = ImportanceSection()
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    """Penalty for leaving the reference, which is the checkpoint that the run started from; the estimator of KL, of
    which k1 has a gradient of zero on average."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the penalty."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Every token weighs the same; every sequence does; or every token, divided by sequences times
    rollout.max_response_tokens."""
    advantage: Literal["grpo", "rloo", "reinforce_plus_plus"] | FunctionName = "grpo"
    """How a response is compared with its group; or module:function called as f(rewards float32[n]) -> float32[n]."""
    normalize_by_std: bool = True
    """Divide a group's advantages by the standard deviation of its rewards (grpo)."""

    @property
    def needs_batch_statistics(self) -> bool:
        """Whether advantages are normalized over the batch, which then has to be complete before any is known."""
        return self.advantage == "reinforce_plus_plus"


class TrainerSection(Section):
    steps: Positive = 100
    """Training steps of the run."""
    groups_per_step: Positive = 16
    """Groups in one mini-batch, that is, per optimizer update."""
    tokens_per_microbatch: Positive = 8192
    """Sequences are packed into microbatches of at most this many tokens, padding aside."""
    microbatch_multiple: Positive = 1
    """Pad each microbatch to a multiple of this many tokens: 1 is no padding, kernels in fp8 want 16 or more."""
    router_replay: Literal["R3", "R2", "off"] = "R3"
    """Replay the rollout engine's routing, the trainer's own of its log-prob pass, or none."""
    verify_replay_steps: NonNegative = 3
    """Compare experts executed with experts asked for during this many first steps."""
    router_fusion: bool = False
    """Megatron's fused router kernel (Transformer Engine): faster, and blind to replay."""
    streaming: bool = True
    """Compute microbatches as soon as groups are there, before the batch is complete; with one mini-batch per step, and
    advantages that need their group alone."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass instead of keeping them: none, those of
    trainer.recompute_modules, or all of each layer."""
    recompute_modules: Annotated[tuple[RecomputeModule, ...], Field(strict=False)] = ("core_attn",)
    """With recompute selective: Megatron's names of what is computed again."""
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()


class RedisSection(Section):
    url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://[^@]*$")] = "redis://127.0.0.1:6379/0"
    """Server and database; rediss:// is TLS. Credentials have settings of their own: this one is written down."""
    username: str | None = None
    """User of the server's access list; none is its default user."""
    password_file: PathName | None = None
    """File that holds the password."""
    ca_file: PathName | None = None
    """Certificates of the authorities that may have signed the server's; by default those of this machine."""


class QueueSection(Section):
    backend: Literal["memory", "redis"] = "memory"
    """Where finished groups and the queue's journal are: in the cluster and the run folder, or in Redis, so that they
    outlive both."""
    redis: RedisSection = RedisSection()
    max_groups: Positive | None = None
    """Bound by groups; by default what the staleness budget can have outstanding."""
    max_bytes: Positive = 2 * 2**30
    """Bound by payload bytes."""


class SyncSection(Section):
    backend: Literal["shm", "nccl"] = "shm"
    """How weights travel: shared memory of one host, or vLLM's NCCL engine."""
    canary_tolerance: PositiveFloat | None = None
    """Largest |engine - trainer| log-prob on the canary; by default 1e-4 in float32, 0.5 in bfloat16. The mean over its
    tokens may be a tenth of that."""
    timeout_s: PositiveFloat = 120.0
    """When a push takes longer, engines that do not answer are replaced; where all do, the run fails."""
    rolling: bool = False
    """Push to one replica after the other, so that generation never stops everywhere; with sync.backend shm."""


class CheckpointSection(Section):
    every: NonNegative = 0
    """Training steps between checkpoints of the trainer; 0 is none but the exported model at the end."""
    keep: Positive = 2
    """Checkpoints that are kept, the newest."""


class RecoverySection(Section):
    max_restarts: NonNegative = 3
    """Times that a process of a kind (a rollout worker, the queue, the trainer) is started again within
    recovery.period_s; after that its death fails the run."""
    period_s: PositiveFloat = 3600.0
    """Period of recovery.max_restarts, in seconds; the queue's restarts are counted over the whole run."""
    backoff_s: NonNegativeFloat = 1.0
    """Wait before a restart; doubled with each further one in the period."""


class WatchdogSection(Section):
    stall_s: PositiveFloat = 60.0
    """When nothing has moved for so long, the log says who waits for whom."""
    abort_s: PositiveFloat = 1800.0
    """When nothing has moved for so long the run fails, with the stacks of every process in its log folder."""


class EvalSection(Section):
    n: Positive = 256
    """Held-out problems evaluated, greedily, before the first and after the last step."""
    every: NonNegative = 0
    """Also every this many policy versions, while the engine stands at that version; 0 is never."""


LoggerName = Literal["tensorboard", "wandb"]


class MetricsSection(Section):
    host: str = "127.0.0.1"
    """Interface of each process's /metrics."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to use, one per process upwards; 0 lets the system choose free ones."""
    engine: bool = True
    """Serve vLLM's own metrics beside ours."""
    samples_per_step: NonNegative = 2
    """Trajectories per step written to samples.jsonl in readable form."""
    loggers: list[LoggerName] = Field(default_factory=list)
    """Where each step's row goes besides: `tensorboard`, `wandb`."""
    timeline_bytes: NonNegative = 64 * 2**20
    """What each process keeps at most of its latest spans for the report's timeline; 0 for none."""


class DebugSection(Section):
    dump_trajectories: NonNegative = 0
    """Keep this many of the last trained groups as wire-format files in the run folder."""


class ResourcesSection(Section):
    pin_cores: bool = True
    """On CPU, pin each engine core and each trainer rank to cores of its own where there are enough."""
    engine_threads: Positive = 1
    """Compute threads per engine on CPU."""
    trainer_threads: Positive = 1
    """Compute threads per trainer rank on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engine and trainer compute."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is <runs>/<name>."""
    runs: PathName = Path("runs")
    """Folder that holds the run folders."""
    seed: NonNegative = 0
    """Seed of everything random."""
    prepare: FunctionName | None = None
    """module:function called with this tree before anything starts; makes missing model and dataset."""
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

    @property
    def required_groups(self) -> int:
        """Groups that one training step consumes."""
        return self.trainer.groups_per_step * self.async_training.require_batches

    @property
    def streams(self) -> bool:
        """Whether a step starts before its batch is complete; see trainer.streaming."""
        one_batch = self.async_training.require_batches == 1
        return self.trainer.streaming and one_batch and not self.trainer.loss.needs_batch_statistics

    @property
    def run_dir(self) -> Path:
        return self.runs / self.name

    @property
    def engine_dtype(self) -> Dtype:
        """Parameter type of the rollout engines."""
        return self.rollout.dtype or self.model.dtype

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        if self.queue.max_groups is not None and self.queue.max_groups < self.required_groups:
            raise ValueError(
                f"queue.max_groups is {self.queue.max_groups}, but a training step needs "
                f"{self.required_groups} groups at once "
                "(trainer.groups_per_step x async_training.require_batches); raise it to that at least"
            )
        if self.rollout.max_num_batched_tokens < self.rollout.max_num_seqs:
            raise ValueError(
                f"rollout.max_num_batched_tokens is {self.rollout.max_num_batched_tokens}, less than "
                f"rollout.max_num_seqs ({self.rollout.max_num_seqs}): a step decodes one token of each"
            )
        if self.sync.backend == "nccl" and self.resources.device == "cpu":
            raise ValueError(
                "sync.backend is nccl, which needs GPUs, but resources.device is cpu; set sync.backend to shm"
            )
        if self.queue.redis.ca_file is not None and not self.queue.redis.url.startswith("rediss://"):
            raise ValueError(
                f"queue.redis.ca_file is set, but queue.redis.url ({self.queue.redis.url}) is not TLS; begin it with "
                "rediss://"
            )
        if self.sync.rolling and self.sync.backend == "nccl":
            raise ValueError(
                "sync.rolling is true, but sync.backend is nccl, whose broadcast reaches every engine at once; set "
                "sync.rolling to false"
            )
        if self.data.eval is not None and self.data.eval == self.data.train:
            raise ValueError(
                f"data.eval and data.train are the same file, {self.data.eval}; evaluate on other problems"
            )
        self._check_group_size()
        self._check_replay()
        self._check_schedule()
        self._check_loss()
        self._check_parallel()
        return self

    def _check_group_size(self) -> None:
        """Raise ValueError where a group may never be handed in short, though it says so."""
        size, n = self.rollout.min_group_size, self.rollout.n
        if size is not None and size > n:
            raise ValueError(f"rollout.min_group_size is {size}, more than rollout.n ({n}); lower it")
        if size is not None and self.rollout.group_timeout_s is None:
            raise ValueError(
                f"rollout.min_group_size is {size}, but rollout.group_timeout_s is not set: nothing would be handed in "
                "short; set a time limit, or leave min_group_size out"
            )
        if self.watchdog.abort_s < self.watchdog.stall_s:
            raise ValueError(
                f"watchdog.abort_s ({self.watchdog.abort_s:g}) is less than watchdog.stall_s "
                f"({self.watchdog.stall_s:g}); raise it"
            )

    def _check_schedule(self) -> None:
        """Raise ValueError for a learning rate that would not do what it is told."""
        optimizer = self.trainer.optimizer
        if optimizer.schedule == "constant":
            if optimizer.decay_steps is not None:
                raise ValueError(
                    f"trainer.optimizer.decay_steps is {optimizer.decay_steps}, but the schedule is constant; set it "
                    "to linear or cosine, or leave decay_steps out"
                )
            return
        if optimizer.decay_steps is None or optimizer.decay_steps <= optimizer.warmup_steps:
            raise ValueError(
                f"trainer.optimizer.schedule is {optimizer.schedule}, but decay_steps is {optimizer.decay_steps}; set "
                f"it above warmup_steps ({optimizer.warmup_steps}), for example to the run's optimizer steps, "
                f"{self.trainer.steps * self.async_training.require_batches}"
            )
        if optimizer.min_lr > optimizer.lr:
            raise ValueError(
                f"trainer.optimizer.min_lr ({optimizer.min_lr}) is above lr ({optimizer.lr}); lower it, the rate falls"
            )

    def _check_loss(self) -> None:
        """Raise ValueError for a loss of which a part would do nothing, or could not be computed."""
        loss, exact = self.trainer.loss, self.async_training.partial_rollout.routing == "exact"
        if (loss.kl != "none") != (loss.kl_coef > 0):
            raise ValueError(
                f"trainer.loss.kl is {loss.kl}, but kl_coef is {loss.kl_coef}: one without the other does nothing; set "
                "kl to k3 and kl_coef above 0, or kl to none and kl_coef to 0"
            )
        if loss.importance.level != "off" and loss.proximal == "behaviour" and loss.policy != "reinforce":
            raise ValueError(
                f"trainer.loss.importance.level is {loss.importance.level}, but trainer.loss.proximal is behaviour: "
                "the ratio holds the whole difference then, and every weight is 1; set proximal to recompute or "
                "interpolate, or importance.level to off"
            )
        if loss.policy == "reinforce" and loss.proximal != "behaviour":
            raise ValueError(
                f"trainer.loss.proximal is {loss.proximal}, but trainer.loss.policy is reinforce, which has no ratio, "
                "and whose importance weights are of the current policy: it would not be used; set it to behaviour"
            )
        if loss.dual_clip is not None and loss.policy in ("cispo", "reinforce"):
            raise ValueError(
                f"trainer.loss.dual_clip is {loss.dual_clip}, but trainer.loss.policy is {loss.policy}, whose loss it "
                "does not bound; set dual_clip to null, or policy to ppo or gspo"
            )
        if loss.importance.mode == "mask" and loss.importance.low > loss.importance.high:
            raise ValueError(
                f"trainer.loss.importance.low ({loss.importance.low}) is above importance.high "
                f"({loss.importance.high}), so that no token would be kept; exchange them"
            )
        if exact and (loss.policy == "gspo" or loss.importance.level == "sequence"):
            raise ValueError(
                "async_training.partial_rollout.routing is exact, which trains a response in pieces, but trainer.loss "
                f"(policy {loss.policy}, importance.level {loss.importance.level}) needs whole sequences; set routing "
                "to replace, or trainer.loss to a policy and importance.level token by token"
            )

    def _check_parallel(self) -> None:
        """Raise ValueError for a layout that no model could have; ``model_config`` judges it by the model."""
        sizes = self.trainer.parallel
        dense, experts = sizes.dp * sizes.tp * sizes.cp, sizes.ep * sizes.etp
        if dense % experts:
            raise ValueError(
                f"trainer.parallel: ep x etp is {experts}, which does not divide dp x tp x cp ({dense}), the ranks of "
                "a pipeline stage, among which the experts are laid out; change one of them"
            )
        if sizes.vpp > 1 and sizes.pp == 1:
            raise ValueError(
                f"trainer.parallel.vpp is {sizes.vpp}, but pp is 1: virtual stages are of a pipeline; set vpp to 1, or "
                "pp to 2 at least"
            )

    def _check_replay(self) -> None:
        """Raise ValueError for settings under which replay would silently do nothing, or not what its name says."""
        replay, partial = self.trainer.router_replay, self.async_training.partial_rollout
        if replay == "R3" and not self.rollout.return_routed_experts:
            raise ValueError(
                "trainer.router_replay is R3, which replays the engine's routing, but rollout.return_routed_experts is "
                "false; set it to true, or trainer.router_replay to R2 or off"
            )
        if replay != "off" and self.trainer.router_fusion:
            raise ValueError(
                f"trainer.router_replay is {replay}, but trainer.router_fusion is true: the fused router ignores what "
                "it is told to replay; set trainer.router_fusion to false, or trainer.router_replay to off"
            )
        if partial.routing == "exact" and replay != "R3":
            raise ValueError(
                f"async_training.partial_rollout.routing is exact, but trainer.router_replay is {replay}: the routing "
                "of each call is kept to be replayed, which only R3 does; set trainer.router_replay to R3, or "
                "async_training.partial_rollout.routing to replace"
            )
        if partial.routing == "exact" and partial.mode == "in_flight":
            raise ValueError(
                "async_training.partial_rollout.routing is exact, but its mode is in_flight: a generation that goes on "
                "with the KV cache of older weights has no context that could be trained exactly; set mode to resume, "
                "or routing to replace"
            )
