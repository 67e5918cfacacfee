"""What is differentiated for a microbatch, and what is reported of it, without a model."""

import numpy as np
import torch

from async_rl.config.training import LossSection, RejectionSection
from async_rl.trainer.losses import load_policy
from async_rl.trainer.objective import policy_objective
from async_rl.trainer.policy_sums import PolicySums

T, V = 12, 7


def microbatch(apart):
    """Two sequences of six tokens; the behaviour log-probs of the second differ from the current ones by ``apart``."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(T, V)).astype(np.float32)).requires_grad_()
    labels = torch.from_numpy(rng.integers(0, V, T))
    current = logits.detach().log_softmax(-1)[torch.arange(T), labels]
    return logits, {
        "labels": labels,
        "loss_mask": torch.arange(T) % 6 != 0,
        "logprobs": current - apart * (torch.arange(T) >= 6),
        "versions": torch.full((T,), 3, dtype=torch.int32),
        "advantages": torch.ones(T),
        "temperature": torch.ones(T),
        "weights": torch.full((T,), 0.5),
        "sequence": torch.arange(T) // 6,
        "resume_position": torch.zeros(T, dtype=torch.int8),
        "engine": torch.zeros(T, dtype=torch.int8),
    }


def objective_of(**loss):
    settings = LossSection(**loss)
    return policy_objective(
        settings,
        load_policy(settings),
        vocabulary=None,
        context=None,
        version=4,
        empty=lambda: PolicySums.zero(2),
    )


def test_the_objective_is_the_weighted_sum_and_counts_what_was_left_out():
    logits, tensors = microbatch(apart=0.05)
    summed, sums = objective_of(rejection=RejectionSection(rule="geometric_mean"))(tensors, logits)
    assert float(summed.detach()) == -0.5 * 5, "a ratio of 1 for the first sequence, and nothing of the second"
    assert (sums["tokens"], sums["rejected"], sums["clipped"]) == (10, 5, 0)
    summed.backward()
    assert (logits.grad[6:] == 0).all()
    assert (logits.grad[1:6].abs().sum(-1) > 0).all()


def test_a_policy_that_masks_counts_as_clipping():
    logits, tensors = microbatch(apart=3.0)
    _, sums = objective_of(policy="ipo", divergence_bound=0.02)(tensors, logits)
    moved = (tensors["logprobs"].exp() - tensors["logprobs"].add(3.0).exp()).abs()[6:][tensors["loss_mask"][6:]]
    assert sums["clipped"] == (moved > 0.02).sum() > 0
    assert sums["rejected"] == 0
