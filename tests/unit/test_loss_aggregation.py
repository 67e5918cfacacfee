"""How the losses of tokens add up, however a batch is cut into microbatches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.training import ImportanceSection
from async_rl.trainer.losses import denominator, load_policy, policy_loss, token_weight
from tests.support.loss_batches import FAST, NAMES, POLICIES, batches, ordinary_batch, small, tokens_of

AGGREGATIONS = ["token_mean", "group_mean", "sequence_mean", "sequence_sum", "fixed_length"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@FAST
@given(batch=batches(), cut=st.integers(0, 4))
def test_aggregation_is_the_mean_it_is_named_for_however_the_batch_is_cut(aggregation, batch, cut):
    """Sequences 0 and 1 are one group, 2 and 3 another."""
    values = np.where(batch["mask"], np.arange(len(batch["mask"])) + 1.0, 0.0)
    sequences = {s: values[(batch["sequence"] == s) & batch["mask"]] for s in np.unique(batch["sequence"])}
    sequences = {s: part for s, part in sequences.items() if len(part)}
    if not sequences:
        return
    parts, limit = list(sequences.values()), 16
    groups = [np.concatenate([p for s, p in sequences.items() if s // 2 == g]) for g in {s // 2 for s in sequences}]
    expected = {
        "token_mean": np.concatenate(parts).mean(),
        "group_mean": np.mean([group.mean() for group in groups]),
        "sequence_mean": np.mean([part.mean() for part in parts]),
        "sequence_sum": np.mean([part.sum() for part in parts]),
        "fixed_length": np.mean([part.sum() / limit for part in parts]),
    }[aggregation]
    total = 0.0
    for microbatch in (list(sequences.items())[:cut], list(sequences.items())[cut:]):
        for s, part in microbatch:
            in_group = sum(len(p) for other, p in sequences.items() if other // 2 == s // 2)
            weight = token_weight(aggregation, tokens=len(part), group_tokens=in_group, max_response_tokens=limit)
            total += weight * part.sum()
    tokens = sum(len(part) for part in parts)
    divisor = denominator(aggregation, tokens=tokens, rollouts=len(parts), groups=len(groups))
    assert total / divisor == pytest.approx(expected)


def test_a_sum_over_a_sequence_leaves_out_what_does_not_count():
    tokens, _ = tokens_of(small())
    assert tokens.sequence_sum(torch.arange(6.0)).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", POLICIES, ids=NAMES)
def test_two_microbatches_have_the_loss_and_the_gradient_of_one(loss, aggregation):
    proximal = "behaviour" if loss.policy == "reinforce" else "recompute"
    importance = ImportanceSection(level="sequence", mode="truncate")
    loss = loss.model_copy(update={"proximal": proximal, "importance": importance, "kl": "k3", "kl_coef": 0.1})
    batch = ordinary_batch(5)
    counts = [int((batch["mask"] & (batch["sequence"] == number)).sum()) for number in range(4)]
    assert all(counts)
    weights = [
        token_weight(aggregation, tokens=count, group_tokens=sum(counts), max_response_tokens=16) for count in counts
    ]
    batch["weights"] = np.array(weights)[batch["sequence"]]
    divisor = denominator(aggregation, tokens=sum(counts), rollouts=len(counts), groups=1)

    def computed(part):
        part = dict(part)
        weights = torch.from_numpy(part.pop("weights"))
        part["sequence"] = part["sequence"] - part["sequence"][0]
        tokens, reference = tokens_of(part, gradient=True)
        total = (policy_loss(tokens, loss, load_policy(loss), reference).loss * weights).sum() / divisor
        total.backward()
        return float(total.detach()), tokens.current.grad.numpy()

    def cut(where):
        return {name: array[where].copy() for name, array in batch.items()}

    whole, gradient = computed(cut(slice(None)))
    first, second = computed(cut(slice(0, 6))), computed(cut(slice(6, None)))
    assert first[0] + second[0] == pytest.approx(whole)
    assert np.concatenate([first[1], second[1]]) == pytest.approx(gradient)
