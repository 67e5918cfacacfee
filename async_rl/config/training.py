"""The settings of the training steps: layout, optimizer, loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from async_rl.config.fields import (
    Arguments,
    Dtype,
    FunctionName,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)

RecomputeModule = Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
OffloadModule = Literal["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]


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
    layers_per_stage: Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    """Layers of each pipeline stage, for example [16, 16, 15, 14]: pp numbers in the order in which a token passes the
    stages, or pp x vpp with virtual stages, the first chunk of every stage before the second of any. Null for equal
    numbers, or where pp x vpp does not divide the layers for numbers that differ by one, the last stage having the
    fewest, because the output layer is there."""
    cp: Positive = 1
    """Context-parallel size."""

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of each virtual stage, in the order in which a token passes them: chunk by chunk.

        Where the numbers differ by one, the larger ones are just before the last stage, which has the output layer; the
        first, which has the embedding and the most microbatches under way, is the last to get one.
        """
        if self.layers_per_stage is not None:
            return self.layers_per_stage
        stages = self.pp * self.vpp
        each, more = divmod(num_layers, stages)
        return tuple(each + (stages - 1 - more <= number < stages - 1) for number in range(stages))


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
    gradient_dtype: Dtype = "float32"
    """Type in which gradients are summed over microbatches and ranks; bfloat16 takes half the memory, loses digits, and
    needs model.dtype bfloat16."""
    first_moment_dtype: Dtype = "float32"
    """Type in which AdamW keeps the first moment; bfloat16, on GPUs only, takes half the memory."""
    second_moment_dtype: Dtype = "float32"
    """Type in which AdamW keeps the second moment; bfloat16, on GPUs only, takes half the memory."""
    offload_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the optimizer's states that are in the host's memory and updated there, on GPUs only: it costs a
    transfer of these parameters and gradients at each update."""


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
    over a rollout's tokens and then over rollouts (sequence_mean); summed over a rollout's tokens and averaged over
    rollouts (sequence_sum); or that sum divided by rollout.max_response_tokens (fixed_length). A rollout is one
    sequence, or several where an agent branches."""
    advantage: Literal["grpo", "rloo", "reinforce_plus_plus", "turn_return"] | FunctionName = "grpo"
    """How a rollout is compared with its group, by name or as module:function, called as f(rewards: float32[n]) ->
    float32[n]. reinforce_plus_plus then compares it with the mini-batch, and with rollout.n 1 with that alone.
    turn_return gives each turn of an agent its own: its reward and those of later turns (Outcome.turn_rewards), minus
    the mean of that over all turns of the group."""
    turn_discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Factor by which turn_return counts a reward less for each turn that it came later."""
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
    tf32: bool = False
    """Whether matrix products in float32 may run in TF32 on GPUs, which keeps three digits of each factor and is
    several times as fast; routers compute in float32 with any model.dtype."""
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
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers trainer.recompute full computes again: all of them, of which the input of every
    recompute_num_layers-th is kept (uniform), or the first recompute_num_layers of each pipeline stage (block)."""
    recompute_num_layers: Positive = 1
    """Layers from one kept input to the next, or layers computed again per stage; see trainer.recompute_method."""
    offload_activations: Annotated[tuple[OffloadModule, ...], Field(strict=False)] = ()
    """Megatron's names of the modules whose inputs wait for the backward pass in the host's memory, for example
    [core_attn, expert_fc1]; on GPUs only."""
    moe_dispatcher: Literal["auto", "alltoall", "allgather", "flex"] = "auto"
    """How tokens get to their experts: through all-to-all, by gathering all tokens on every rank, or through DeepEP's
    kernels (flex, on GPUs where DeepEP is installed). auto is allgather for one rank alone, else alltoall."""
    megatron: Arguments = Field(default_factory=dict)
    """Further fields of Megatron's TransformerConfig, for example {moe_shared_expert_overlap: true}, for what no
    setting names."""
    ddp: Arguments = Field(default_factory=dict)
    """Further fields of Megatron's DistributedDataParallelConfig, for example {bucket_size: 100000000}."""
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()
