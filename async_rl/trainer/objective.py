"""What is differentiated for a microbatch, as the ``LossFunction`` that ``executor`` calls with its logits.

Joins the log-probs of the tokens (``logprobs``) to the losses (``losses``) and to what is reported (``policy_sums``).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from async_rl.config.schema import LossSection
from async_rl.trainer import losses
from async_rl.trainer.logprobs import token_logprobs
from async_rl.trainer.losses import PolicyLoss
from async_rl.trainer.megatron.executor import LossFunction, Tensors
from async_rl.trainer.policy_sums import PolicySums, policy_sums


def policy_objective(
    settings: LossSection,
    policy: PolicyLoss,
    *,
    temperature: float,
    vocabulary: Any,
    version: int,
    stalenesses: int,
) -> LossFunction:
    """The weighted sum of the policy loss; keeps the microbatch's PolicySums.

    vocabulary: the process group over which the logits are split, None if they are not. version: the policy version
    that consumes the tokens; stalenesses: how many different ones of its tokens are told apart.
    """
    context = parallel_state.get_context_parallel_group()

    def objective(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, PolicySums]:
        current, entropy = token_logprobs(logits, tensors["labels"], temperature, vocabulary)
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
        value, clipped = losses.policy_loss(tokens, settings, policy, tensors.get("reference"))
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

    return objective


def cross_entropy(vocabulary: Any) -> LossFunction:
    """The summed cross entropy of the tokens that count, at temperature 1; keeps its value."""

    def objective(tensors: Tensors, logits: torch.Tensor) -> tuple[torch.Tensor, float]:
        logprobs, _entropy = token_logprobs(logits, tensors["labels"], group=vocabulary)
        summed = -torch.where(tensors["loss_mask"], logprobs, 0.0).sum()
        return summed, float(summed.detach())

    return objective
