"""Policy losses, token by token, and how they are added up. Pure: torch only; knows the settings in ``config``.

    policy            what is clipped, and by what ratio: current over proximal policy
    proximal          the policy that the ratio starts from: behaviour, recomputed, or interpolated
    importance        weight of proximal over behaviour policy, which pays for their difference
    kl                a penalty that keeps the policy near a reference
    aggregation       the weight of a token in the sum, and what the sum is divided by

Losses are values by token, never means: they are weighted, summed, and divided once by a count over the global batch,
so that no result depends on how sequences were packed or spread over ranks. Shapes: T positions of a microbatch, those
that this rank has. A position outside the mask may hold anything, NaN included: values are selected, not multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch.distributed.nn.functional import all_reduce

from async_rl.config.functions import load_function
from async_rl.config.schema import ImportanceSection, LossSection
from async_rl.errors import TrainerError

# Bound of |log ratio| before it is exponentiated: e^20 is far beyond any clip, and its square still fits
# float32.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a loss sees. current, behaviour, proximal: log-probs float32[T] of the predicted tokens, the first with a
    gradient; advantages float32[T]; mask bool[T], the tokens that count; staleness int64[T], in policy versions.

    sequence_sum: float32[T] -> float32[T], for each token the sum over the tokens that count of its sequence, which
    may lie on several ranks; gradients go through it.
    """

    current: torch.Tensor
    behaviour: torch.Tensor
    proximal: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    staleness: torch.Tensor
    sequence_sum: Callable[[torch.Tensor], torch.Tensor]

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` where a token counts, 0 elsewhere."""
        return torch.where(self.mask, values, 0.0)

    def log_ratio(self, above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        """above - below, bounded, 0 outside the mask."""
        return bounded(torch.where(self.mask, above - below, 0.0))

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """For each token the mean over its sequence's tokens that count."""
        return self.sequence_sum(values) / self.sequence_sum(self.select(torch.ones_like(values))).clamp(min=1.0)


class TokenLoss(NamedTuple):
    """loss float32[T], 0 outside the mask; clipped bool[T], where clipping stops the gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor


PolicyLoss = Callable[[Tokens, LossSection], TokenLoss]


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# ---- policies ----


def ppo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """PPO's clipped objective (arXiv:1707.06347), with a clip range of its own on either side (arXiv:2503.14476), and
    optionally a bound on the loss of negative advantages (dual clip, arXiv:1912.09729)."""
    return _clipped(tokens, torch.exp(tokens.log_ratio(tokens.current, tokens.proximal)), settings)


def gspo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """GSPO (arXiv:2507.18071): one ratio for a sequence, the geometric mean over its tokens, clipped as a whole.

    Each token carries its sequence's value, so that the paper's objective is the mean over a sequence, then over
    sequences: aggregation ``sequence_mean``.
    """
    log_ratio = tokens.sequence_mean(tokens.log_ratio(tokens.current, tokens.proximal))
    return _clipped(tokens, torch.exp(bounded(log_ratio)), settings)


def cispo(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """CISPO (arXiv:2506.13585): the importance weight is clipped and held, so that no token loses its gradient."""
    ratio = torch.exp(tokens.log_ratio(tokens.current, tokens.proximal)).detach()
    weight = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    loss = -weight * tokens.select(tokens.advantages) * tokens.select(tokens.current)
    # Nothing is stopped; what is reported is where the weight is at its bound.
    return TokenLoss(loss, (weight != ratio) & tokens.mask)


def reinforce(tokens: Tokens, settings: LossSection) -> TokenLoss:
    """The policy gradient without a ratio (Williams, 1992); importance weights make it off-policy."""
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


POLICIES: dict[str, PolicyLoss] = {"ppo": ppo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}


def load_policy(settings: LossSection) -> PolicyLoss:
    """The loss that trainer.loss.policy names. Raises TrainerError if it is a function that cannot be called so.

    A user's function is shown 0 wherever no token counts, and what it returns is checked at every call.
    """
    if settings.policy in POLICIES:
        return POLICIES[settings.policy]
    function = load_function("trainer.loss.policy", settings.policy, ("tokens", "settings"), TrainerError)

    def checked(tokens: Tokens, settings: LossSection) -> TokenLoss:
        # Tokens that were not sampled have a behaviour log-prob of NaN. In a function that knows nothing of it, that
        # would reach every gradient, whatever is selected from the result.
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


# ---- what stands around them ----


def interpolated_proximal(behaviour: torch.Tensor, current: torch.Tensor, staleness: torch.Tensor) -> torch.Tensor:
    """The proximal policy between behaviour and current policy, without a pass of its own (A-3PO, arXiv:2512.06547).

    Log-linear by version: of a token of staleness d, the policy at the step's start is d of the d + 1 versions on the
    way to the one that the update makes. At d = 0 it is the behaviour policy itself. The paper counts that last version
    too: its weight of the behaviour policy, 1 over the staleness, is 1 / (d + 1) here. No gradient.
    """
    share = staleness / (staleness + 1.0)
    return torch.lerp(behaviour, current.detach(), share.to(behaviour.dtype))


def importance_weights(tokens: Tokens, settings: ImportanceSection, *, of: torch.Tensor) -> torch.Tensor:
    """Weight float32[T] of the policy with log-probs ``of`` over the behaviour policy. No gradient.

    level sequence: one weight for a sequence, the product over its tokens, not a mean. mode plain (decoupled PPO,
    arXiv:2505.24298); truncate, at most ``high`` (truncated importance sampling, Ionides, 2008; between engine and
    trainer: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025); mask, 0
    outside of [low, high] (IcePop, arXiv:2510.18855).
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
    """Estimate float32[T] of KL(current || reference) (Schulman, "Approximating KL divergence", 2020), with
    x = reference - current log-prob: k1 -x, k2 x^2 / 2, k3 e^x - 1 - x.

    What trains is its gradient, and that is another question (arXiv:2510.01555): on the policy's own samples k2's is
    the KL's, k3's is close to it as long as x is small, and k1's is zero on average.
    """
    x = tokens.log_ratio(reference, tokens.current)
    if kind == "k1":
        return -x
    return 0.5 * x.square() if kind == "k2" else torch.expm1(x) - x


def policy_loss(
    tokens: Tokens, settings: LossSection, policy: PolicyLoss, reference: torch.Tensor | None = None
) -> TokenLoss:
    """The whole loss by token: policy, importance weights, penalty. reference: log-probs float32[T] for the last, None
    where no token counts, as in a microbatch of padding."""
    loss, clipped = policy(tokens, settings)
    if settings.importance.level != "off":
        # Without a ratio of its own, what the policy gradient has to be corrected for is the whole way.
        of = tokens.current if settings.policy == "reinforce" else tokens.proximal
        loss = loss * importance_weights(tokens, settings.importance, of=of)
    if settings.kl != "none" and reference is not None:
        loss = loss + settings.kl_coef * kl_penalty(tokens, reference, settings.kl)
    return TokenLoss(loss, clipped)


# ---- adding up ----

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


def token_weight(aggregation: Aggregation, tokens: int, max_response_tokens: int) -> float:
    """The weight of each token of a sequence of which ``tokens`` count; see ``denominator``."""
    if aggregation == "token_mean":
        return 1.0
    return 1.0 / (max_response_tokens if aggregation == "fixed_length" else max(tokens, 1))


def denominator(aggregation: Aggregation, tokens: float, sequences: float) -> float:
    """What the weighted sum over the global batch is divided by, of which ``tokens`` count in ``sequences``.

    token_mean: every token weighs the same (arXiv:2503.14476). sequence_mean: every sequence does (GRPO,
    arXiv:2402.03300). fixed_length: every token, whatever else there is in the batch (Dr. GRPO, arXiv:2503.20783).
    """
    return tokens if aggregation == "token_mean" else sequences


def sequence_sums(
    sequence: torch.Tensor, mask: torch.Tensor, group: torch.distributed.ProcessGroup | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``Tokens.sequence_sum`` of a microbatch: sequence int64[T], which one each token belongs to. With a ``group``,
    its ranks have parts of the same sequences, each of every one."""
    count = int(sequence.max()) + 1

    def summed(values: torch.Tensor) -> torch.Tensor:
        totals = values.new_zeros(count).index_add(0, sequence, torch.where(mask, values, 0.0))
        if group is not None and group.size() > 1:
            totals = all_reduce(totals, group=group)
        return totals[sequence]

    return summed
