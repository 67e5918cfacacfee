"""Microbatches for tests of the losses: drawn by hypothesis with ratios at and beyond every edge, or ordinary."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from async_rl.config.training import LossSection
from async_rl.trainer.losses import MAX_LOG_RATIO, Tokens, sequence_sums
from tests.support.examples import examples

# A ratio of exactly 1, at either clip, one ulp of float32 around them, 0 and infinity for all that float32 knows.
LOG_RATIOS = st.one_of(
    st.floats(-3, 3, width=32),
    st.sampled_from([0.0, float(np.log(0.8)), float(np.log(1.3)), -1e4, 1e4, MAX_LOG_RATIO, -MAX_LOG_RATIO]),
)
FAST = settings(max_examples=examples(60), deadline=None)


@st.composite
def batches(draw):
    """Arrays of a microbatch of some sequences, the first of which may be one token; NaN where the mask is off.

    No log-prob is above 0.
    """
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = sum(lengths)

    def each(values):
        return np.array(draw(st.lists(values, min_size=count, max_size=count)), np.float32)

    def moved(logprobs):
        return np.minimum(logprobs + each(LOG_RATIOS), 0)

    behaviour = each(st.floats(-8, 0, width=32))
    proximal = moved(behaviour)
    arrays = {
        "behaviour": behaviour,
        "proximal": proximal,
        "current": moved(proximal),
        "reference": moved(behaviour),
        "advantages": each(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.5])),
    }
    mask = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    for array in arrays.values():
        array[~mask] = np.nan
    return arrays | {
        "mask": mask,
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "staleness": np.array(draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))),
    }


def tokens_of(batch, gradient=False):
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}
    sums = sequence_sums(tensors.pop("sequence"), tensors["mask"])
    reference = tensors.pop("reference")
    tensors["current"].requires_grad_(gradient)
    return Tokens(**tensors, sequence_sum=sums), reference


def ratio_of(batch, above, below):
    return np.exp(np.clip(batch[above].astype(np.float64) - batch[below], -MAX_LOG_RATIO, MAX_LOG_RATIO))


def ordinary_batch(seed, sequences=4, length=6):
    """Moderate ratios on either side of the clips, in float64; a fifth of the tokens is NaN and does not count."""
    rng = np.random.default_rng(seed)
    count = sequences * length
    behaviour = -3 * rng.random(count)
    proximal = np.minimum(behaviour + rng.normal(0, 0.3, count), 0)
    batch = {
        "behaviour": behaviour,
        "proximal": proximal,
        "current": np.minimum(proximal + rng.normal(0, 0.6, count), 0),
        "reference": np.minimum(behaviour + rng.normal(0, 0.5, count), 0),
        "advantages": rng.normal(size=count),
    }
    mask = rng.random(count) < 0.8
    for array in batch.values():
        array[~mask] = np.nan
    return batch | {
        "mask": mask,
        "sequence": np.repeat(np.arange(sequences), length),
        "staleness": rng.integers(0, 4, count),
    }


def small(**changes):
    """Two sequences of three tokens, of the second of which nothing counts."""
    zeros = np.zeros(6, np.float32)
    batch = dict.fromkeys(("behaviour", "proximal", "current", "reference"), zeros) | {
        "advantages": np.ones(6, np.float32),
        "mask": np.array([1, 1, 0, 0, 0, 0], bool),
        "sequence": np.repeat([0, 1], 3),
        "staleness": np.zeros(6, int),
    }
    return batch | {name: np.asarray(values, np.float32) for name, values in changes.items()}


# One of each policy, by name.
POLICIES = [
    LossSection(policy="ppo", clip_low=0.2, clip_high=0.3),
    LossSection(policy="ppo", clip_low=0.2, clip_high=0.3, dual_clip=3.0),
    LossSection(policy="gspo", clip_low=0.2, clip_high=0.3),
    LossSection(policy="cispo", clip_low=0.5, clip_high=2.0),
    LossSection(policy="cispo", clip_low=1.0, clip_high=4.0),
    LossSection(policy="dppo", divergence_bound=0.1),
    LossSection(policy="dppo", divergence="kl"),
    LossSection(policy="ipo"),
    LossSection(policy="reinforce"),
]
NAMES = ["ppo", "dual clip", "gspo", "cispo", "cispo above", "dppo tv", "dppo kl", "ipo", "reinforce"]
