"""Log-probs and entropies of tokens against plain NumPy and torch."""

import numpy as np
import pytest
import torch

from async_rl.trainer.logprobs import token_logprobs

T, V = 40, 11


def reference_logprobs(logits, targets, temperature):
    scaled = logits.astype(np.float64) / temperature
    logs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return logs[np.arange(len(targets)), targets], -(np.exp(logs) * logs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_token_logprobs_and_entropy_are_of_logits_over_temperature(temperature):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(T, V)).astype(np.float32) * 3, rng.integers(0, V, T)
    expected, expected_entropy = reference_logprobs(logits, targets, temperature)
    logprobs, entropy = token_logprobs(torch.from_numpy(logits), torch.from_numpy(targets), temperature)
    assert logprobs.numpy() == pytest.approx(expected, abs=1e-5)
    assert entropy.numpy() == pytest.approx(expected_entropy, abs=1e-5)


def test_token_logprobs_gradient_is_that_of_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(T, V, requires_grad=True)
    targets, weights = torch.randint(0, V, (T,)), torch.randn(T)
    (token_logprobs(logits, targets, 0.7)[0] * weights).sum().backward()
    ours, logits.grad = logits.grad, None
    expected = (logits / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours, logits.grad, rtol=1e-5, atol=1e-6)


def test_token_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(T, V).bfloat16()
    targets = torch.randint(0, V, (T,))
    logprobs, _ = token_logprobs(logits, targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits.float(), targets)[0])
