"""Log-probs and entropies of tokens against plain NumPy and torch."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from async_rl.trainer.logprobs import token_logprobs

T, V = 40, 11


def reference_logprobs(logits, targets, temperature):
    scaled = logits.astype(np.float64) / temperature
    logs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return logs[np.arange(len(targets)), targets], -(np.exp(logs) * logs).sum(-1)


EACH_ITS_OWN = np.linspace(0.4, 2.0, T, dtype=np.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6, EACH_ITS_OWN])
def test_token_logprobs_and_entropy_are_of_logits_over_temperature(temperature):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(T, V)).astype(np.float32) * 3, rng.integers(0, V, T)
    rows = np.broadcast_to(temperature, T)[:, None]
    expected, expected_entropy = reference_logprobs(logits, targets, rows)
    given = torch.from_numpy(temperature) if isinstance(temperature, np.ndarray) else temperature
    logprobs, entropy = token_logprobs(torch.from_numpy(logits), torch.from_numpy(targets), given)
    assert logprobs.numpy() == pytest.approx(expected, abs=1e-5)
    assert entropy.numpy() == pytest.approx(expected_entropy, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, torch.from_numpy(EACH_ITS_OWN)])
def test_token_logprobs_gradient_is_that_of_log_softmax(temperature):
    torch.manual_seed(0)
    logits = torch.randn(T, V, requires_grad=True)
    targets, weights = torch.randint(0, V, (T,)), torch.randn(T)
    (token_logprobs(logits, targets, temperature)[0] * weights).sum().backward()
    ours, logits.grad = logits.grad, None
    rows = temperature if isinstance(temperature, float) else temperature[:, None]
    expected = (logits / rows).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours, logits.grad, rtol=1e-5, atol=1e-6)


def test_token_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(T, V).bfloat16()
    targets = torch.randint(0, V, (T,))
    logprobs, _ = token_logprobs(logits, targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits.float(), targets)[0])


def computed(logits, targets, weights):
    """Return log-probs, entropies, and the gradient of the weighted sum of the log-probs."""
    logits = logits.clone().requires_grad_()
    values, entropy = token_logprobs(logits, targets, 0.7)
    (values * weights).sum().backward()
    return values.detach(), entropy, logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_block_and_beside_any_neighbours(monkeypatch, dtype):
    torch.manual_seed(0)
    logits, targets, weights = (torch.randn(33, 5000) * 3).to(dtype), torch.randint(0, 5000, (33,)), torch.randn(33)
    whole = computed(logits, targets, weights)
    assert whole[2].dtype == dtype
    for rows in (1, 4, 7, 32, 1000):
        monkeypatch.setattr("async_rl.trainer.logprobs.BLOCK_SIZE", rows * 5000)
        for part in (slice(0, 33), slice(3, 20), slice(5, 6)):
            found = computed(logits[part], targets[part], weights[part])
            for got, wanted in zip(found, whole, strict=True):
                assert torch.equal(got, wanted[part]), (rows, part)


class Largest(TorchDispatchMode):
    """Notes the largest tensor of each type that is made."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and func is not torch.ops.aten.detach.default:
                self.elements[tensor.dtype] = max(self.elements.get(tensor.dtype, 0), tensor.numel())
        return result


def test_logits_are_never_copied_whole_to_float32(monkeypatch):
    monkeypatch.setattr("async_rl.trainer.logprobs.BLOCK_SIZE", 8 * 1000)
    logits, targets = torch.randn(100, 1000).bfloat16().requires_grad_(), torch.randint(0, 1000, (100,))
    with Largest() as forward:
        values, _ = token_logprobs(logits, targets)
    with Largest() as backward:
        values.sum().backward()
    assert forward.elements[torch.float32] <= 8 * 1000
    assert forward.elements.get(torch.bfloat16, 0) <= 8 * 1000, "the forward pass keeps the logits, and no copy"
    assert backward.elements[torch.float32] <= 8 * 1000
    assert backward.elements[torch.bfloat16] == 100 * 1000, "the gradient of the logits, in their own type"
