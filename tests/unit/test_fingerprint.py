"""A mismatch is traced to its layer, on streams whose layers are known functions."""

import numpy as np
import pytest

from async_rl.weights.fingerprint import (
    SCALES,
    WIDTH,
    blame,
    describe_layer_drift,
    describe_routing_drift,
    layer_differences,
    projection,
    routing_differences,
)

HIDDEN, TOKENS, LAYERS = 64, 40, 6


def stream(fault=None, size=0.1, noise=0.0, embedding_fault=0.0, contribution=1.0):
    """Fingerprints [L+1, N, WIDTH] of a stack of random layers; ``fault`` is the one whose weights are off."""
    rng = np.random.default_rng(0)
    other = np.random.default_rng(1)
    x = rng.normal(size=(TOKENS, HIDDEN))
    x = x + embedding_fault * other.normal(size=x.shape)
    states = [x]
    for layer in range(LAYERS):
        weight = rng.normal(size=(HIDDEN, HIDDEN)) / np.sqrt(HIDDEN)
        if layer == fault:
            weight = weight + size * other.normal(size=weight.shape) / np.sqrt(HIDDEN)
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True))
        x = x + contribution * np.tanh(normed @ weight) + noise * other.normal(size=x.shape)
        states.append(x)
    return np.stack(states) @ projection(HIDDEN).astype(np.float64)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0])
def test_the_layer_whose_weights_are_off_is_named_and_no_other(layer, size):
    differences = layer_differences(stream(layer, size), stream())
    assert [d.name for d in blame(differences, SCALES["float32"])] == [f"layer {layer}"]
    assert f"differs most in layer {layer} " in describe_layer_drift(stream(layer, size), stream(), SCALES["float32"])


def test_a_layer_that_adds_little_is_named_all_the_same():
    """What counts is what it adds: in the stream as a whole the difference drowns."""
    small = {"contribution": 1e-5}
    differences = layer_differences(stream(3, 0.1, **small), stream(**small))
    assert [d.name for d in blame(differences, SCALES["float32"])] == ["layer 3"]


def test_other_embeddings_are_named_and_not_the_layers_after_them():
    differences = layer_differences(stream(embedding_fault=0.1), stream())
    assert [d.name for d in blame(differences, SCALES["float32"])] == ["embeddings"]


def test_rounding_blames_nobody():
    assert blame(layer_differences(stream(noise=1e-7), stream()), SCALES["float32"]) == []
    assert "the final norm or the output layer" in describe_layer_drift(stream(), stream(), SCALES["float32"])


def test_a_stream_that_is_not_finite_is_infinitely_far():
    broken = stream()
    broken[3] = np.nan
    assert next(d.name for d in blame(layer_differences(broken, stream()), SCALES["float32"])) == "layer 2"


def test_the_projection_is_the_same_on_both_sides_and_keeps_lengths():
    np.testing.assert_array_equal(projection(HIDDEN), projection(HIDDEN))
    assert projection(HIDDEN).shape == (HIDDEN, WIDTH)
    np.testing.assert_allclose(np.abs(projection(HIDDEN)), 1 / np.sqrt(HIDDEN), rtol=1e-6)


def test_routing_that_differs_is_told_by_layer_whatever_the_order_of_experts():
    ours = [np.array([[[0, 1], [2, 3]], [[4, 5], [1, 0]]], np.uint8)]
    same = [ours[0][..., ::-1].copy()]
    assert routing_differences(ours, same, (0, 3)) == [(0, 0.0), (3, 0.0)]
    assert "same experts in every layer" in describe_routing_drift([(0, 0.0), (3, 0.0)], first=True)
    theirs = [ours[0].copy()]
    theirs[0][1, 1] = [2, 3]
    assert routing_differences(ours, theirs, (0, 3)) == [(0, 0.0), (3, 0.5)]
    assert describe_routing_drift([(0, 0.1), (3, 0.5)], first=True).endswith("is layer 0 (10% of rows)")
    assert describe_routing_drift([(0, 0.1), (3, 0.5)], first=False).endswith(
        "in layer 3 (50% of rows), layer 0 (10% of rows)"
    )
