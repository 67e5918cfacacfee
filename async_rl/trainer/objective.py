"""Makes the scalar that is differentiated for a microbatch, as a ``LossFunction`` for the executor.

Joins the log-probs of the tokens (``logprobs``), the losses (``losses``) and the sums that are reported
(``policy_sums``). Knows neither the model nor which process groups there are: it is given those it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from async_rl.config.training import LossSection
from async_rl.trainer import losses
from async_rl.trainer.logprobs import token_logprobs
from async_rl.trainer.losses import PolicyLoss
from async_rl.trainer.policy_sums import PolicySums, policy_sums

if TYPE_CHECKING:
    from async_rl.trainer.megatron.executor import LossFunction, Tensors


def policy_objective(
    settings: LossSection,
    policy: PolicyLoss,
    *,
    vocabulary: torch.distributed.ProcessGroup | None,
    context: torch.distributed.ProcessGroup,
    version: int,
    empty: Callable[[], PolicySums],
) -> LossFunction:
    """Return the function that computes the weighted sum of the policy loss and keeps the microbatch's PolicySums.

    vocabulary: the process group over which the logits are split, None if they are not. context: the group over which
    sequences are split. version: the policy version that consumes the tokens. empty: returns sums of no token.
    """

    def objective(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, PolicySums]:
        current, entropy = token_logprobs(logits, tensors["labels"], tensors["temperature"], vocabulary)
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
            sequence_sum=losses.sequence_sums(tensors["sequence"], mask, context),
        )
        value, clipped, rejected = losses.policy_loss(tokens, settings, policy, tensors.get("reference"))
        summed = (value * tensors["weights"]).sum()
        sums = policy_sums(
            loss=summed.detach(),
            current=current.detach(),
            behaviour=behaviour,
            entropy=entropy,
            clipped=clipped,
            rejected=rejected,
            staleness=staleness,
            resume_position=tensors["resume_position"].long(),
            engine=tensors["engine"].long(),
            mask=mask,
            empty=empty(),
        )
        return summed, sums

    return objective


def cross_entropy(vocabulary: torch.distributed.ProcessGroup | None) -> LossFunction:
    """Return the function that computes and keeps the summed cross entropy of the tokens that count, at temperature 1.

    vocabulary: as in ``policy_objective``.
    """

    def objective(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, float]:
        logprobs, _entropy = token_logprobs(logits, tensors["labels"], group=vocabulary)
        summed = -torch.where(tensors["loss_mask"], logprobs, 0.0).sum()
        return summed, float(summed.detach())

    return objective
