"""The settings of a run: one typed tree, in which each field has its sentence and unknown keys are rejected.

The sentences are the user's reference: --help and docs/reference/settings.md print them. Names follow verl's
fully-async recipe where it has one. ``checks`` refuses combinations that cannot work, ``doctor`` what this machine or
the model cannot do; ``loading`` reads the tree from a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from async_rl.config.checks import check_combinations


def _whole(value: Any) -> Any:
    """Return the integer that YAML reads as a number with a fraction of zero: 1e6 is one to the user."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _possible(path: Path) -> Path:
    try:
        if b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise ValueError("not a valid file path")


PathName = Annotated[Path, Field(strict=False), AfterValidator(_possible)]  # YAML has no paths, so strings are accepted
DataFiles = PathName | list[PathName]
RowFormat = Literal["plain", "messages", "verl", "trl"]
RoutingPolicy = Literal["replace", "preserve", "exact"]
Dtype = Literal["float32", "bfloat16"]
RecomputeModule = Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
FunctionName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
RewardName = Annotated[str, Field(pattern=r"^((verl|trl):)?[\w.]+:\w+$")]
PartName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,31}$")]
EngineName = Annotated[str, Field(pattern=r"^(vllm|[\w.]+:\w+)$")]


class Section(BaseModel):
    """A node of the tree: frozen, without unknown keys or infinities, and strict: "3" and true are not integers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """The model to train."""

    path: PathName
    """Hugging Face checkpoint folder with config.json, *.safetensors and tokenizer."""
    dtype: Dtype = "bfloat16"
    """Parameter type of the trainer, and of the engines unless rollout.dtype is set."""
    trust_remote_code: bool = False
    """Whether to run code that comes with the checkpoint."""


class SourceSection(Section):
    """One of several datasets that a run trains on."""

    path: DataFiles
    """Its files, as in data.train."""
    weight: NonNegativeFloat = 1.0
    """Its share of the prompts issued, relative to the weights of the other sources."""
    format: RowFormat | None = None
    """As data.format; null for its value."""
    prompt_field: str | None = None
    """As data.prompt_field; null for its value."""
    system_prompt: str | None = None
    """As data.system_prompt; null for its value."""
    order_by: str | None = None
    """As data.order_by; null for its value."""
    limit: Positive | None = None
    """Use the first so many rows alone; null for all."""


class DataSection(Section):
    """The prompts to train and evaluate on."""

    train: DataFiles | None = None
    """JSONL, Parquet or Arrow file with one prompt per row, a folder that datasets has saved with save_to_disk, a
    pattern such as data/*.parquet, or a list of these; the fields other than data.prompt_field are passed to the
    reward. Required unless data.sources is set. With data.allow_download also hf:NAME:SPLIT or
    hf:NAME:CONFIGURATION:SPLIT, a dataset of the Hugging Face Hub."""
    sources: Annotated[dict[PartName, SourceSection], Field(max_length=32)] = Field(default_factory=dict)
    """Several datasets by name in place of data.train, for example {math: {path: math.jsonl, weight: 3}, code: {path:
    code.jsonl, prompt_field: task}}. Of every so many prompts issued, each source has its share by weight, to less than
    one prompt. format, prompt_field and system_prompt replace those of data for the source, limit takes its first rows
    alone. On the command line: --data.sources.math.weight 2."""
    eval: DataFiles | None = None
    """As data.train, of held-out prompts; null switches evaluation off."""
    format: RowFormat = "plain"
    """How rows are laid out. A prompt that is a list of messages is always rendered with the chat template; one that is
    text is taken as it stands (plain, trl) or as the message of a user (messages, verl). verl also needs data_source
    and reward_model.ground_truth."""
    prompt_field: str = "prompt"
    """Name of the field that contains the prompt: text, or messages."""
    system_prompt: str | None = None
    """System message for prompts that begin with none of their own."""
    chat_template: PathName | None = None
    """File with a Jinja chat template to use in place of the checkpoint's."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, for example {enable_thinking: false}; those of a row's field
    chat_template_kwargs win."""
    tools: PathName | None = None
    """JSON file with a list of tools that the chat template describes to the policy; a row's field tools wins."""
    rows_in_memory: Positive = 20_000
    """How many rows are read and checked before a run starts, and kept in memory. Later rows are read from the files
    when their turn comes; a Parquet file of more rows is unpacked once, below runs/.data."""
    allow_download: bool = False
    """Whether a dataset that is named hf:... may be downloaded from the Hugging Face Hub, with the library datasets."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens; a row with a longer one is a bad row (data.on_bad_row)."""
    on_bad_row: Literal["skip", "fail"] = "fail"
    """What to do with a malformed, empty or too long row: skip it (counted, and reported with its line), or fail the
    run."""
    shuffle: bool = True
    """Whether to shuffle the rows in each epoch, with the run's seed."""
    order_by: str | None = None
    """Column with a number, such as a difficulty, by which the rows come in each epoch, ascending; data.shuffle then
    holds among rows of equal numbers. null for none. All rows are read for it before the run starts."""


class WeightedReward(Section):
    """One of several rewards."""

    function: RewardName
    """The function, as in reward.function."""
    weight: float = 1.0
    """Its factor in the sum."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """As reward.arguments."""
    slow: bool | None = None
    """As reward.slow; null for its value."""


class RewardSection(Section):
    """The functions that score responses."""

    function: RewardName = "async_rl.rollout.rewards.text:exact_match"
    """The reward as module:function, called as f(prompt: Prompt, response: str), or with those of prompt, response,
    turns, finish_reason, completion_ids, fields and the row's columns that its signature names. It returns a number, a
    mapping of named numbers with the reward as score, or None where it does not apply: the response is left out of its
    group (see rollout.min_group_size). verl:module:function is called as verl calls compute_score,
    trl:module:function as TRL calls a reward, once for a group."""
    functions: Annotated[dict[PartName, WeightedReward], Field(max_length=16)] = Field(default_factory=dict)
    """Several rewards by name in place of reward.function, of which the weighted sum is the reward, for example
    {right: {function: "my:right"}, form: {function: "my:form", weight: 0.2}}. One that returns None drops out of the
    sum. On the command line: --reward.functions.form.weight 0.5."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Values for arguments of reward.function by name, for example {pattern: "<answer>.*</answer>"}; columns of the
    same name are not passed."""
    slow: bool = False
    """Whether to run a plain reward in worker processes; set it for rewards that wait for a service, compute for long,
    use signals or may hang. Rewards that are async def have an event loop of their own."""
    timeout_s: PositiveFloat = 30.0
    """Seconds that a call of a slow or async reward may take before it is ended; see reward.on_error for what happens
    then. The reward rewards.code:unit_tests has a time limit for each program instead."""
    workers: Positive | None = None
    """Worker processes of a slow reward, and programs of rewards.code, that run at one time per replica; further calls
    wait, which does not count towards their time limits. null for 32 processes, which are started as they are needed,
    and for one program per core, at most 8."""
    retries: NonNegative = 2
    """Further attempts, after 0.5 s, 1 s, 2 s and so on, when a slow or async reward raises an exception or an async
    one takes too long; what has used up its time in a worker process is not tried again."""
    rate_limit: NonNegative = 0
    """Calls of the reward per reward.rate_period_s and replica; 0 for no limit."""
    rate_period_s: PositiveFloat = 1.0
    """Period of reward.rate_limit, in seconds."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do when a reward finally raises, times out or is not finite: fail the run, or skip the response if
    rollout.min_group_size allows, else its group (counted)."""
    truncated: Literal["score", "leave_out"] = "score"
    """What to do with a response that ends at rollout.max_response_tokens: score it as any other, or leave it out of
    its group without a call of the reward, if rollout.min_group_size allows, else give up its group. Evaluations score
    all."""
    overlong_tokens: NonNegative = 0
    """Tokens below rollout.max_response_tokens from which on a longer response loses reward, linearly, up to
    reward.overlong_penalty at the limit; 0 for none. Evaluations leave it out."""
    overlong_penalty: PositiveFloat = 1.0
    """The reward that a response of rollout.max_response_tokens loses; see reward.overlong_tokens."""


class PartialRolloutSection(Section):
    """What happens to generations in flight at a weight sync."""

    mode: Literal["resume", "in_flight", "drain"] = "resume"
    """What happens to a generation at a weight sync: it is aborted and resumed by prefilling it again (resume), paused
    and continued on its old KV cache (in_flight), or finished before the sync (drain)."""
    routing: RoutingPolicy = "replace"
    """Which routed experts a resumed generation is trained with: those of the resumed call, which covers all earlier
    tokens (replace); the earlier ones, extended by the resumed call (preserve); or for each segment those of its own
    call, at the cost of computing prefixes again (exact)."""


class AsyncTrainingSection(Section):
    """How far generation may run ahead of training, and how old tokens may be."""

    staleness_threshold: NonNegativeFloat = 0.5
    """Admission: groups that may be outstanding beyond those that a version window consumes, as a share of these."""
    max_staleness: NonNegative = 4
    """Hard bound: no token older than this many versions contributes a gradient."""
    on_stale: Literal["mask", "drop"] = "mask"
    """What to do with tokens over the bound: mask them one by one, or drop the group and issue its prompt again."""
    trigger_parameter_sync_step: Positive = 1
    """Training steps per weight sync."""
    require_batches: Positive = 1
    """Mini-batches that must be ready before a training step starts; each is one optimizer update."""
    partial_rollout: PartialRolloutSection = PartialRolloutSection()


class EnvironmentSection(Section):
    """The environment that answers the policy between its turns."""

    function: FunctionName | None = None
    """The environment as module:function, called as f(prompt: Prompt, turns: tuple[str, ...]) -> str | None when the
    policy stops: the text that it returns is appended and the policy continues, None ends the response."""
    max_turns: Annotated[int, Field(ge=2, lt=2**63)] = 8
    """Turns of the policy in one response, which ends with the last of them."""
    slow: bool = True
    """Whether to run an environment that is a plain function in worker processes; false calls it at once, which suits
    functions of microseconds. Environments that are async def have an event loop of their own."""
    timeout_s: PositiveFloat = 30.0
    """Seconds that a call of the environment may take before it is ended; see rollout.environment.on_error for what
    happens then."""
    workers: Positive = 32
    """Worker processes per replica if the environment is a plain function, started as they are needed; further calls
    wait, which does not count towards their time limit."""
    retries: NonNegative = 2
    """Further attempts, after 0.5 s, 1 s, 2 s and so on, when an environment that is slow or async raises an exception,
    or an async one takes too long."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do when the environment finally raises, times out or returns no text: fail the run, or skip the response
    if rollout.min_group_size allows, else its group (counted)."""


class FilterSection(Section):
    """Finished groups that are not trained because they would teach nothing; other prompts take their places."""

    zero_variance: bool = False
    """Whether to filter groups whose rewards are all equal, as DAPO's dynamic sampling does; else they are trained with
    advantages of zero. As with the other filters, the prompt of a filtered group is done for the epoch, and rewards are
    taken as the reward functions return them, without the penalty of reward.overlong_tokens."""
    all_truncated: bool = False
    """Whether to filter groups of which every response ended at rollout.max_response_tokens."""
    mean_reward: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Lowest and highest mean reward of a group that is trained, for example [0.05, 0.95]; null for any."""
    function: FunctionName | None = None
    """A module:function that decides in addition, called as f(group: FinishedGroup) -> bool, at once, on the worker's
    event loop; groups for which it returns false are filtered. One that raises is treated like a reward that does
    (reward.on_error)."""
    rest_epochs: NonNegative = 0
    """Epochs after its own in which the row of a filtered group is passed over; 0 to try it again in the next. Where
    all rows rest, none does."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the last 200 groups to end that may be filtered; above it the run logs a warning, and fails if that
    lasts for watchdog.abort_s. 1 for any."""

    @property
    def active(self) -> bool:
        """Whether any group may be filtered."""
        return self.zero_variance or self.all_truncated or self.mean_reward is not None or self.function is not None


class ReplicaRange(Section):
    """How many replicas a run has whose hosts come and go."""

    min: Positive
    """Replicas with which the run starts."""
    max: Positive
    """Replicas that the run asks the cluster for."""


def _kind_of_replicas(value: Any) -> str:
    """Return by which of its two types rollout.replicas is judged, so that a fault is reported once."""
    return "range" if isinstance(value, dict | ReplicaRange) else "number"


class RolloutSection(Section):
    """The rollout engines and how they sample."""

    replicas: Annotated[
        Annotated[Positive, Tag("number")] | Annotated[ReplicaRange, Tag("range")], Discriminator(_kind_of_replicas)
    ] = 1
    """Number of replicas, each a rollout engine with its worker. Or {min: 2, max: 8} where hosts come and go, as with
    an autoscaler or preemptible hosts: the run starts with min replicas, asks Ray for places for max, and takes in each
    further replica once it has a host. Those of a host that goes are asked for again. On the command line:
    --rollout.replicas.min 2 --rollout.replicas.max 8."""
    engine: EngineName = "vllm"
    """The engine that samples: vllm, or module:Class of one that has the methods of RolloutEngine."""
    dtype: Dtype | None = None
    """Parameter type of the engines; null for the trainer's (model.dtype)."""
    return_routed_experts: bool = True
    """Whether the engine of a MoE model returns each token's routed experts; trainer.router_replay R3 needs them."""
    n: Positive = 8
    """Responses per prompt, that is, trajectories per group; 1 only with an estimator that needs no group
    (trainer.loss.advantage reinforce_plus_plus, or a function)."""
    max_response_tokens: Positive = 1024
    """Longest response, in tokens over all its segments."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; behaviour log-probs are those of the distribution after it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling's probability mass; only 1 can be trained on, because the trainer's log-probs are of the whole
    vocabulary."""
    top_k: Annotated[int, Field(ge=-1, lt=2**63)] = 0
    """How many of the likeliest tokens may be sampled, 0 or -1 for all; only all can be trained on, as with
    rollout.top_p."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest probability, as a share of the likeliest token's, that may be sampled; only 0 can be trained on, as with
    rollout.top_p."""
    presence_penalty: float = 0.0
    """What a token's logit loses if the response has it; only 0 can be trained on, because the trainer's log-probs are
    those of the model."""
    frequency_penalty: float = 0.0
    """What a token's logit loses each time that the response has it; only 0 can be trained on, as with
    rollout.presence_penalty."""
    repetition_penalty: PositiveFloat = 1.0
    """What the logit of a token that prompt or response has is divided by; only 1 can be trained on, as with
    rollout.presence_penalty."""
    min_tokens: NonNegative = 0
    """Tokens before which no stop token could be sampled; only 0 can be trained on, because the trainer's log-probs
    are of the whole vocabulary, stop tokens included."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] = Field(default_factory=list)
    """Strings at which a response, or a turn of it, ends, for example ["</answer>"]. It ends with the token that
    completes the string, all of which stays in it, and has finish_reason stop. Evaluations end so too. A token for
    rollout.stop_token_ids takes less time than a string."""
    stop_token_ids: list[NonNegative] = Field(default_factory=list)
    """Further tokens that end a response, or a turn of it, beside the end-of-sequence tokens of the checkpoint."""
    max_num_seqs: Positive = 128
    """Sequences that one engine decodes at once."""
    max_trajectories: Positive | None = None
    """Unfinished trajectories that one replica works on; null for rollout.max_num_seqs. Agents that wait for their
    tools decode nothing: set it higher, so that others take their places in the engine meanwhile."""
    max_num_batched_tokens: Positive = 4096
    """Tokens of one engine step, including prefill."""
    kv_cache_bytes: Positive = 512 * 2**20
    """Bytes of one engine's KV cache on CPU; on GPUs rollout.gpu_memory_utilization decides."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of a GPU's memory that one engine takes."""
    tensor_parallel_size: Positive = 1
    """GPUs per engine."""
    enforce_eager: bool = False
    """Whether to skip compilation, so that the engine starts sooner and decodes more slowly."""
    group_timeout_s: PositiveFloat | None = None
    """Seconds that a group may take; then it is published with the responses that are finished, if they are enough
    (rollout.min_group_size), or its prompt is issued again."""
    min_group_size: Annotated[int, Field(ge=2, lt=2**63)] | None = None
    """Responses with which a group may be published: the finished ones after rollout.group_timeout_s, and those left
    when others have failed or have no reward; null for all n."""
    max_attempts: Positive = 3
    """How many groups of one prompt may exceed rollout.group_timeout_s before the prompt is given up."""
    max_failed_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the last groups to end that may be given up (by reward, environment, engine, time-out or staleness)
    before the run fails; 1 for any."""
    filter: FilterSection = FilterSection()
    environment: EnvironmentSection = EnvironmentSection()

    @property
    def replica_range(self) -> ReplicaRange:
        """The fewest and the most replicas; equal unless rollout.replicas says otherwise."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas
        return ReplicaRange(min=self.replicas, max=self.replicas)

    @property
    def elastic(self) -> bool:
        """Whether replicas come and go with their hosts; see rollout.replicas."""
        return isinstance(self.replicas, ReplicaRange)

    @property
    def trajectory_limit(self) -> int:
        """Unfinished trajectories that one replica works on; see rollout.max_trajectories."""
        return self.max_trajectories or self.max_num_seqs


class ParallelSection(Section):
    """The trainer's parallel layout."""

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
    """AdamW and its learning rate."""

    lr: PositiveFloat = 1e-6
    """Learning rate after warm-up."""
    warmup_steps: NonNegative = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to trainer.optimizer.min_lr, linearly or as a cosine."""
    decay_steps: Positive | None = None
    """Optimizer steps, including warm-up, until the learning rate reaches min_lr; required unless the schedule is
    constant."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule, and from then on."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay rate of the second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip_grad: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""


class ImportanceSection(Section):
    """Importance weights that correct for sampling under an older policy."""

    level: Literal["off", "token", "sequence"] = "off"
    """Whether to weight the loss by the ratio of proximal to behaviour policy (of current to behaviour policy with
    trainer.loss.policy reinforce): not at all, per token, or by the product over a sequence."""
    mode: Literal["plain", "truncate", "mask"] = "truncate"
    """How to bound the weights: not at all (plain), by importance.high (truncate), or by setting weights outside of
    importance.low to importance.high to 0 (mask)."""
    low: NonNegativeFloat = 0.5
    """Smallest weight that is kept with mode mask."""
    high: PositiveFloat = 2.0
    """Largest weight with modes truncate and mask."""


class RejectionSection(Section):
    """Tokens that are left out of the policy loss because engine and trainer differ too much on them."""

    rule: Literal["off", "geometric_mean", "k3", "second_moment"] = "off"
    """What is left out: nothing (off); sequences whose tokens' ratios have a geometric mean outside of rejection.low to
    rejection.high (geometric_mean), or a mean of the KL estimate k3 above rejection.bound (k3); or tokens with the
    largest squared log ratio, until the mean of the others is below rejection.bound (second_moment, which is M2PO). The
    ratio is that of the proximal to the behaviour policy, or of the current to the behaviour policy where
    trainer.loss.proximal is behaviour."""
    low: PositiveFloat = 0.999
    """Smallest geometric mean that is kept."""
    high: PositiveFloat = 1.001
    """Largest geometric mean that is kept."""
    bound: PositiveFloat | None = None
    """Bound of k3 or of the mean square; null for 0.01 with k3 and 0.04 with second_moment."""

    @property
    def limit(self) -> float:
        """The bound of k3 or of the mean square; see rejection.bound."""
        return self.bound or (0.04 if self.rule == "second_moment" else 0.01)


class LossSection(Section):
    """The policy loss."""

    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Lower clip of the importance ratio: 1 - clip_low; 1 for none."""
    clip_high: PositiveFloat = 0.2
    """Upper clip of the importance ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio where the advantage is negative (dual clip, for ppo and gspo); null for no bound."""
    policy: Literal["ppo", "gspo", "cispo", "dppo", "ipo", "reinforce"] | FunctionName = "ppo"
    """The policy loss by name, or as module:function, called as f(tokens: Tokens, settings: LossSection) -> TokenLoss
    with a loss for each token."""
    divergence: Literal["tv", "kl"] = "tv"
    """How dppo measures that a token's probability has moved: by its difference (tv), or by the KL divergence of
    sampling the token or any other one (kl)."""
    divergence_bound: PositiveFloat | None = None
    """Divergence beyond which dppo and ipo leave a token out; null for 0.15 with dppo and tv, 0.05 with dppo and kl,
    and 0.3 with ipo."""
    proximal: Literal["behaviour", "recompute", "interpolate"] = "behaviour"
    """The policy in the ratio's denominator: the one that sampled (behaviour), the trainer's at the start of the step,
    at the cost of a forward pass (recompute), or one between the two, by staleness (interpolate)."""
    importance: ImportanceSection = ImportanceSection()
    rejection: RejectionSection = RejectionSection()
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    """Estimator of the KL penalty for leaving the reference, the checkpoint that the run started from; the gradient of
    k1 is zero on average."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty."""
    aggregation: Literal["token_mean", "group_mean", "sequence_mean", "sequence_sum", "fixed_length"] = "token_mean"
    """How the loss is averaged: over all tokens (token_mean); over a group's tokens and then over groups (group_mean);
    over a sequence's tokens and then over sequences (sequence_mean); summed over a sequence's tokens and averaged over
    sequences (sequence_sum); or that sum divided by rollout.max_response_tokens (fixed_length)."""
    advantage: Literal["grpo", "rloo", "reinforce_plus_plus"] | FunctionName = "grpo"
    """How a response is compared with its group, by name or as module:function, called as f(rewards: float32[n]) ->
    float32[n]. reinforce_plus_plus then compares it with the mini-batch, and with rollout.n 1 with that alone."""
    normalize_by_std: bool = True
    """Whether to divide a group's advantages by the standard deviation of its rewards (grpo)."""

    @property
    def needs_batch_statistics(self) -> bool:
        """Whether a token's loss depends on the whole mini-batch, which then must be complete before any is known."""
        return self.advantage == "reinforce_plus_plus" or self.rejection.rule == "second_moment"

    @property
    def divergence_limit(self) -> float:
        """Divergence beyond which dppo and ipo leave a token out; see trainer.loss.divergence_bound."""
        usual = 0.3 if self.policy == "ipo" else 0.05 if self.divergence == "kl" else 0.15
        return self.divergence_bound or usual


class TrainerSection(Section):
    """The training steps."""

    steps: Positive = 100
    """Training steps of the run."""
    groups_per_step: Positive = 16
    """Groups in one mini-batch, that is, per optimizer update."""
    tokens_per_microbatch: Positive = 8192
    """Most tokens of a microbatch that sequences are packed into, not counting padding."""
    microbatch_multiple: Positive = 1
    """Pad each microbatch to a multiple of this many tokens: 1 for no padding; fp8 kernels need at least 16."""
    router_replay: Literal["R3", "R2", "off"] = "R3"
    """Which routed experts the training pass replays: the rollout engine's (R3), those of the trainer's own log-prob
    pass (R2), or none (off)."""
    verify_replay_steps: NonNegative = 3
    """Number of first steps in which the experts executed are compared with the experts to replay."""
    router_fusion: bool = False
    """Whether to use Megatron's fused router kernel (Transformer Engine), which is faster and cannot replay."""
    streaming: bool = True
    """Whether to compute microbatches as soon as groups arrive, before the mini-batch is complete; needs one mini-batch
    per step, advantages that depend on one group alone, no KL penalty, and with a pipeline no other forward pass."""
    mask_truncated: bool = False
    """Whether to keep responses that ended at rollout.max_response_tokens out of the loss, as DAPO's overlong filtering
    does; their rewards still count in the comparison within their group. reward.truncated leaves them out of that
    too."""
    skip_zero_advantage: bool = False
    """Whether to leave out the forward and backward pass of samples whose advantage is 0, such as those of a group
    whose rewards are all equal; the gradient stays the same, metrics of tokens are of the others alone."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass instead of kept: none, those of
    trainer.recompute_modules (selective), or all of each layer (full)."""
    recompute_modules: Annotated[tuple[RecomputeModule, ...], Field(strict=False)] = ("core_attn",)
    """Megatron's names of the modules whose activations are computed again with trainer.recompute selective."""
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()


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
    copies: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2)] = 1
    """Hosts of the cluster that have each finished group: 2 for a copy on a second one, so that the loss of one host
    loses none; the copies take as much memory again, which max_bytes does not count."""


class SyncSection(Section):
    """The weight sync from trainer to engines."""

    backend: Literal["auto", "shm", "object_store", "nccl"] = "auto"
    """How weights are transferred: through shared memory of one host (shm), through Ray's object store to any number of
    hosts, or by vLLM's NCCL engine; auto for object_store if the run joins a cluster, else shm."""
    canary_tolerance: PositiveFloat | Literal["auto"] | None = "auto"
    """Largest difference of log-probs between engine and trainer on a token of the canary; the mean may be a tenth of
    it. auto for three times what the run's first comparison measures, at least 1e-4 in float32 and 0.5 in bfloat16;
    null for these alone."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that a weight sync may take; then engines that do not answer are replaced, and if all answer, the run
    fails."""
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


HELD_OUT = "held_out"
"""The name of the set of data.eval, beside those of eval.sets."""


class EvalSetSection(Section):
    """A set of problems to evaluate on, and how its responses are sampled."""

    path: DataFiles
    """JSONL or Parquet file, pattern or list, laid out as data.train is and read by the settings of data."""
    k: Positive = 1
    """Responses per problem."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling's probability mass. Nothing of an evaluation is trained on, so that any value is right."""
    top_k: NonNegative = 0
    """Likeliest tokens to sample from; 0 for all."""
    limit: Positive | None = None
    """Number of problems, the first of the file; null for all."""
    every: NonNegative | None = None
    """As eval.every, for this set; null for its value."""
    pass_at: float = 1.0
    """Reward from which on a response passes, for pass@k."""
    pass_k: list[Positive] | None = None
    """The k of the pass@k to report, each at most k; null for 1 and k."""
    source_field: str = "data_source"
    """Column with the name of a problem's source; results are also given for each source. Problems without it count in
    the whole set only."""

    @property
    def pass_sizes(self) -> tuple[int, ...]:
        """The k of each pass@k that is reported, ascending."""
        return tuple(sorted({1, self.k} if self.pass_k is None else set(self.pass_k)))


class EvalSection(Section):
    """Evaluation on held-out prompts."""

    n: Positive = 256
    """Number of held-out prompts to evaluate, greedily, before the first and after the last step."""
    every: NonNegative = 0
    """Policy versions between further evaluations, each while the engine has that version; 0 for none."""
    beside_rollouts: bool = True
    """Whether rollouts continue during an evaluation within training, for whose end the next weight sync waits. false
    pauses them: the evaluation takes less time, and nothing is sampled until its longest response has ended."""
    sets: Annotated[dict[PartName, EvalSetSection], Field(max_length=16)] = Field(default_factory=dict)
    """Further sets of problems by name, evaluated when the held-out prompts are, for example {aime: {path: aime.jsonl,
    k: 16, temperature: 0.6}}. The name held_out is that of the held-out prompts."""


LoggerName = Literal["tensorboard", "wandb"]


class MetricsSection(Section):
    """Where metrics and samples go."""

    host: str | None = None
    """Address on which each process serves /metrics, 0.0.0.0 for all interfaces; null for 127.0.0.1 if the run is on
    one host, and on several for each host's own address in the cluster's network, which has no access control."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to use, counting upwards by process; 0 lets the system choose free ones."""
    engine: bool = True
    """Whether to serve vLLM's own metrics as well."""
    samples_per_step: NonNegative = 2
    """Trajectories per step written to samples.jsonl in readable form."""
    sample_characters: Positive = 16_384
    """Most characters of a sample's prompt and of its response; of a longer one beginning and end are written."""
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


class ClusterSection(Section):
    """The Ray cluster of a run over several hosts."""

    address: str | None = None
    """Address of the Ray cluster to join, for example 10.0.0.1:6379, or auto for the one of this host; null for
    RAY_ADDRESS if it is set, else for a cluster that the run starts on this host and ends."""
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@:-]{1,15}$")] | None = None
    """Network interface of the trainer's ranks on every host, for example eth0; null for the one with the route to rank
    0."""
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
        """Parameter type of the rollout engines."""
        return self.rollout.dtype or self.model.dtype

    @model_validator(mode="after")
    def _check_combinations(self) -> RunConfig:
        check_combinations(self)
        return self
