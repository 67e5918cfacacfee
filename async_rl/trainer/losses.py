"""Computes policy losses token by token, and the weights by which they add up. Pure: torch only; knows the settings.

    policy            the clipped or masked objective, with the ratio of the current over the proximal policy
    proximal          the policy that the ratio starts from: behaviour, recomputed, or interpolated
    importance        the weight of the proximal over the behaviour policy, which corrects for their difference
    rejection         what is left out because the two differ too much (``rejection``)
    kl                a penalty that keeps the policy near a reference
    aggregation       the weight of a token in the sum, and the divisor of the sum

Losses are values by token, never means: they are weighted, summed, and divided once by a count over the global batch,
so that no result depends on how sequences were packed or spread over ranks. Shapes: T positions of a microbatch, those
that this rank has. A position outside the mask may hold any value, NaN included: values are selected, not multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch.distributed.nn.functional import all_reduce

from async_rl.config.functions import load_function
from async_rl.config.training import ImportanceSection, LossSection
from async_rl.errors import TrainerError
from async_rl.trainer.rejection import rejected_sequences

# Bound of |log ratio| before it is exponentiated: e^20 is far beyond any clip, and its square still fits float32.
MAX_LOG_RATIO = 20.0
# Bound of the probability of any other token, so that it can be divided by: what lies between 1 and the float32 below.
MIN_PROBABILITY = 6e-8


@dataclass(frozen=True, slots=True)
class Tokens:
    """The input of a loss: the predicted tokens at T positions."""

    current: torch.Tensor
    """float32[T]: log-probs under the current policy, with a gradient."""
    behaviour: torch.Tensor
    """float32[T]: log-probs under the policy that sampled them."""
    proximal: torch.Tensor
    """float32[T]: log-probs under the policy that the ratio starts from."""
    advantages: torch.Tensor
    """float32[T]."""
    mask: torch.Tensor
    """bool[T]: the tokens that count."""
    staleness: torch.Tensor
    """int64[T], in policy versions."""
    sequence_sum: Callable[[torch.Tensor], torch.Tensor]
    """float32[T] -> float32[T]: for each token, the sum over the tokens of its sequence that count.

    They may lie on several ranks. Gradients flow through it.
    """

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` where a token counts, 0 elsewhere."""
        return torch.where(self.mask, values, 0.0)

    def log_ratio(self, above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        """Return above - below, bounded, and 0 outside the mask."""
        return bounded(torch.where(self.mask, above - below, 0.0))

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each token the mean over those tokens of its sequence that count."""
        return self.sequence_sum(values) / self.sequence_sum(self.select(torch.ones_like(values))).clamp(min=1.0)


class TokenLoss(NamedTuple):
    """The value of a loss for each token."""

    loss: torch.Tensor
    """float32[T], 0 outside the mask."""
    clipped: torch.Tensor
    """bool[T]: where clipping stops the gradient."""


class WholeLoss(NamedTuple):
    """The value of the whole loss for each token: that of the policy, corrected, and the penalty."""

    loss: torch.Tensor
    """float32[T], 0 outside the mask."""
    clipped: torch.Tensor
    """bool[T]: where the policy's clipping stops the gradient."""
    rejected: torch.Tensor
    """bool[T]: tokens without a policy loss because two policies differ too much on them."""


PolicyLoss = Callable[[Tokens, LossSection], TokenLoss]


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """Clamp a log ratio so that its exponential is finite."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# ---- policies ----


def ppo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """Compute PPO's clipped objective (arXiv:1707.06347), with separate clip ranges on either side (arXiv:2503.14476).

    Optionally the loss of negative advantages is bounded (dual clip, arXiv:1912.09729).
    """
    return _clipped(tokens, torch.exp(tokens.log_ratio(tokens.current, tokens.proximal)), settings)


def gspo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """Compute GSPO (arXiv:2507.18071): one ratio per sequence, the geometric mean over its tokens, clipped as a whole.

    Each token carries its sequence's value, so that the paper's objective is the mean over a sequence, then over
    sequences: aggregation ``sequence_mean``.
    """
    log_ratio = tokens.sequence_mean(tokens.log_ratio(tokens.current, tokens.proximal))
    return _clipped(tokens, torch.exp(bounded(log_ratio)), settings)


def cispo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """Compute CISPO (arXiv:2506.13585): a clipped weight without a gradient, so that no token loses its own."""
    ratio = torch.exp(tokens.log_ratio(tokens.current, tokens.proximal)).detach()
    weight = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    loss = -weight * tokens.select(tokens.advantages) * tokens.select(tokens.current)
    # No gradient is stopped; reported are the tokens whose weight is at its bound.
    return TokenLoss(loss, (weight != ratio) & tokens.mask)


def dppo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """Compute DPPO (arXiv:2602.04879): PPO whose clip is on an estimate of the divergence in place of the ratio.

    A token has no loss if it diverges by more than the bound and the update would move it further. The estimates are of
    the distribution over two outcomes, the token and any other one: the total variation, |current - proximal|, or the
    KL divergence from the proximal to the current policy (the paper's Binary-TV and Binary-KL; dppo_tv and dppo_kl in
    verl/trainer/ppo/core_algos.py, which bounds the ratio of the others too). With the behaviour policy as the proximal
    it is the paper's choice.
    """
    advantages, limit = tokens.select(tokens.advantages), settings.divergence_limit
    current, proximal = tokens.select(tokens.current.detach()), tokens.select(tokens.proximal)
    divergence = binary_kl(proximal, current) if settings.divergence == "kl" else _moved(proximal, current).abs()
    moves_away = torch.sign(advantages) * (current - proximal) > 0
    return _masked(tokens, (divergence > limit) & moves_away)


def ipo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """Compute IPO, the default of prime-rl: tokens whose probability differs by more than the bound have no loss.

    Unlike dppo, whatever the sign of the advantage: |current - behaviour| > bound, as ipo_loss_fn of
    src/prime_rl/trainer/rl/loss.py (PrimeIntellect-ai/prime-rl, pull request 3418; 0.3 without its penalty since 3586).
    """
    behaviour, current = tokens.select(tokens.proximal), tokens.select(tokens.current.detach())
    return _masked(tokens, _moved(behaviour, current).abs() > settings.divergence_limit)


def binary_kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """Return KL(of || to) of sampling a token or any other one, from the token's two log-probs, float32[T] each."""
    others, others_to = ((-torch.expm1(x)).clamp(min=MIN_PROBABILITY) for x in (of, to))
    return torch.exp(of) * (of - to) + others * torch.log(others / others_to)


def reinforce(tokens: Tokens, _settings: LossSection) -> TokenLoss:
    """Compute the policy gradient without a ratio (Williams, 1992); importance weights make it off-policy."""
    loss = -tokens.select(tokens.advantages) * tokens.select(tokens.current)
    return TokenLoss(loss, torch.zeros_like(tokens.mask))


def _clipped(tokens: Tokens, ratio: torch.Tensor, settings: LossSection) -> TokenLoss:
    advantages = tokens.select(tokens.advantages)
    plain = ratio * advantages
    bound = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high) * advantages
    objective = torch.minimum(plain, bound)
    clipped = bound < plain
    if settings.dual_clip is not None:
        floor = settings.dual_clip * advantages
        beyond = (advantages < 0) & (objective < floor)
        objective, clipped = torch.where(beyond, floor, objective), clipped | beyond
    return TokenLoss(tokens.select(-objective), clipped & tokens.mask)


def _moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return by how much probabilities have moved, from log-probs."""
    return torch.exp(after) - torch.exp(before)


def _masked(tokens: Tokens, left_out: torch.Tensor) -> TokenLoss:
    """Return the loss without a clip of the tokens that are not left out."""
    ratio = torch.exp(tokens.log_ratio(tokens.current, tokens.proximal))
    left_out = left_out & tokens.mask
    return TokenLoss(torch.where(left_out, 0.0, -ratio * tokens.select(tokens.advantages)), left_out)


POLICIES: dict[str, PolicyLoss] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "dppo": dppo,
    "ipo": ipo,
    "reinforce": reinforce,
}


def load_policy(settings: LossSection) -> PolicyLoss:
    """Return the loss that trainer.loss.policy names.

    A user's function gets 0 wherever no token counts, and its result is checked at every call. Raises TrainerError if
    that function cannot be found, or not be called with tokens and settings.
    """
    if settings.policy in POLICIES:
        return POLICIES[settings.policy]
    function = load_function("trainer.loss.policy", settings.policy, ("tokens", "settings"), TrainerError)

    def checked(tokens: Tokens, settings: LossSection) -> TokenLoss:
        # Tokens that were not sampled have a behaviour log-prob of NaN. A function that does not select them away would
        # spread it to every gradient, whatever is selected from its result.
        shown = replace(
            tokens,
            current=tokens.select(tokens.current),
            behaviour=tokens.select(tokens.behaviour),
            proximal=tokens.select(tokens.proximal),
            advantages=tokens.select(tokens.advantages),
        )
        result = function(shown, settings)
        loss = result if isinstance(result, TokenLoss) else TokenLoss(result, torch.zeros_like(tokens.mask))
        _check_returned(settings.policy, "loss", loss.loss, tokens.current)
        _check_returned(settings.policy, "clipped", loss.clipped, tokens.mask)
        return TokenLoss(tokens.select(loss.loss), loss.clipped & tokens.mask)

    return checked


def _check_returned(policy: str, name: str, value: object, like: torch.Tensor) -> None:
    expected = f"{like.dtype} {list(like.shape)}"
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
    if found != expected:
        raise TrainerError(
            f"trainer.loss.policy {policy}: returned a {name} of {found}; expected {expected}, a value for each token"
        )


# ---- corrections and penalties ----


def interpolated_proximal(behaviour: torch.Tensor, current: torch.Tensor, staleness: torch.Tensor) -> torch.Tensor:
    """Interpolate the proximal between the behaviour and the current policy (A-3PO, arXiv:2512.06547).

    It takes no forward pass of its own, and has no gradient. Log-linear by version: for a token of staleness d, the
    policy at the step's start is d of the d + 1 versions on the way to the one that the update makes. At d = 0 it is
    the behaviour policy itself. The paper counts that last version too: its weight of the behaviour policy, 1 over the
    staleness, is 1 / (d + 1) here.
    """
    share = staleness / (staleness + 1.0)
    return torch.lerp(behaviour, current.detach(), share.to(behaviour.dtype))


def importance_weights(tokens: Tokens, settings: ImportanceSection, *, of: torch.Tensor) -> torch.Tensor:
    """Return weights float32[T] of the policy with log-probs ``of`` over the behaviour policy. No gradient.

    level sequence: one weight per sequence, the product over its tokens, not a mean.
    mode plain: decoupled PPO, arXiv:2505.24298.
    mode truncate: at most ``high`` (truncated importance sampling, Ionides, 2008; between engine and trainer: Yao et
    al., "Your efficient RL framework secretly brings you off-policy RL training", 2025).
    mode mask: 0 outside of [low, high] (IcePop, arXiv:2510.18855).
    """
    log_weight = tokens.log_ratio(of.detach(), tokens.behaviour)
    if settings.level == "sequence":
        log_weight = bounded(tokens.sequence_sum(log_weight))
    weight = torch.exp(log_weight)
    if settings.mode == "truncate":
        weight = weight.clamp(max=settings.high)
    elif settings.mode == "mask":
        weight = torch.where((weight >= settings.low) & (weight <= settings.high), weight, 0.0)
    return weight


def kl_penalty(tokens: Tokens, reference: torch.Tensor, kind: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """Estimate KL(current || reference) for each token, float32[T].

    With x = reference - current log-prob: k1 is -x, k2 is x^2 / 2, k3 is e^x - 1 - x (Schulman, "Approximating KL
    divergence", 2020). Their gradients, which train, have other properties (arXiv:2510.01555): on the policy's own
    samples, that of k2 is the KL's, that of k3 is close to it as long as x is small, and that of k1 is zero on average.
    """
    x = tokens.log_ratio(reference, tokens.current)
    if kind == "k1":
        return -x
    return 0.5 * x.square() if kind == "k2" else torch.expm1(x) - x


def policy_loss(
    tokens: Tokens, settings: LossSection, policy: PolicyLoss, reference: torch.Tensor | None = None
) -> WholeLoss:
    """Compute the whole loss by token: policy, importance weights, rejection and KL penalty.

    reference: log-probs float32[T] for the penalty; None where no token counts, as in a microbatch of padding.
    """
    loss, clipped = policy(tokens, settings)
    rejected = torch.zeros_like(tokens.mask)
    if settings.importance.level != "off":
        # REINFORCE has no ratio, so its weight corrects for the whole way from behaviour to current policy.
        of = tokens.current if settings.policy == "reinforce" else tokens.proximal
        weights = importance_weights(tokens, settings.importance, of=of)
        loss = loss * weights
        if settings.importance.mode == "mask":
            rejected = (weights == 0) & tokens.mask
    if settings.rejection.rule in ("geometric_mean", "k3"):
        other = tokens.current.detach() if settings.proximal == "behaviour" else tokens.proximal
        log_ratio = tokens.log_ratio(other, tokens.behaviour)
        rejected = rejected | rejected_sequences(log_ratio, tokens.sequence_mean, settings.rejection) & tokens.mask
        loss = torch.where(rejected, 0.0, loss)
    if settings.kl != "none" and reference is not None:
        loss = loss + settings.kl_coef * kl_penalty(tokens, reference, settings.kl)
    return WholeLoss(loss, clipped, rejected)


# ---- adding up ----

Aggregation = Literal["token_mean", "group_mean", "sequence_mean", "sequence_sum", "fixed_length"]


def token_weight(aggregation: Aggregation, *, tokens: int, group_tokens: int, max_response_tokens: int) -> float:
    """Return the weight of each token of a rollout of which ``tokens`` count; see ``denominator``.

    group_tokens: how many count in all rollouts of its group.
    """
    match aggregation:
        case "token_mean" | "sequence_sum":
            return 1.0
        case "group_mean":
            return 1.0 / max(group_tokens, 1)
        case "sequence_mean":
            return 1.0 / max(tokens, 1)
        case "fixed_length":
            return 1.0 / max_response_tokens


def denominator(aggregation: Aggregation, *, tokens: float, rollouts: float, groups: float) -> float:
    """Return the divisor of the weighted sum over the global batch, in which so many tokens, rollouts, groups count.

    token_mean: every token weighs the same (loss_agg_mode token-mean in verl/trainer/ppo/core_algos.py). group_mean:
    every group weighs the same, and so do the tokens in it (the objective of DAPO, arXiv:2503.14476, is an expectation
    over prompts; ScaleRL's prompt average, arXiv:2510.13786). sequence_mean: every rollout weighs the same (GRPO,
    arXiv:2402.03300), and so do the tokens in all its trajectories. sequence_sum: every token weighs the same, however
    many there are (seq-mean-token-sum in verl). fixed_length: that, divided by the longest length possible (Dr. GRPO,
    arXiv:2503.20783). In the papers a rollout is one sequence.
    """
    if aggregation == "token_mean":
        return tokens
    return groups if aggregation == "group_mean" else rollouts


def sequence_sums(
    sequence: torch.Tensor, mask: torch.Tensor, group: torch.distributed.ProcessGroup | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``Tokens.sequence_sum`` for a microbatch with the sequence int64[T] that each token belongs to.

    With a ``group``, each of its ranks has a part of every sequence.
    """
    count = int(sequence.max()) + 1

    def summed(values: torch.Tensor) -> torch.Tensor:
        totals = values.new_zeros(count).index_add(0, sequence, torch.where(mask, values, 0.0))
        if group is not None and group.size() > 1:
            totals = all_reduce(totals, group=group)
        return totals[sequence]

    return summed
