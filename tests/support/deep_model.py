"""A transformer of 30 thin layers in plain torch, computed in two ways as an engine and a trainer would.

What a deep model has and a small one has not: rounding that adds up over the layers, and tokens that it finds so
unlikely that their log-probs move by much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from async_rl.weights.fingerprint import projection

LAYERS, HIDDEN, HEADS, INNER, VOCAB = 30, 64, 4, 128, 512
SHAPES = {"qkv": (HIDDEN, 3 * HIDDEN), "out": (HIDDEN, HIDDEN), "up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}
# Log-probs of random tokens are about -20 then, as those of real models are.
SHARPNESS = 6.0

Weights = dict[str, torch.Tensor]


def make(seed: int = 0) -> Weights:
    """Return random weights in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[0] ** 0.5

    weights = {f"{layer}.{name}": draw(*shape) for layer in range(LAYERS) for name, shape in SHAPES.items()}
    weights["embedding"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    weights["head"] = draw(HIDDEN, VOCAB) * SHARPNESS
    return weights


def updated(weights: Weights, size: float, seed: int = 1) -> Weights:
    """Return the weights after an update that changes each tensor by ``size`` of its own scale."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights.items()
    }


def layer(weights: Weights, number: int) -> Weights:
    """Return the tensors of one layer."""
    return {name: tensor for name, tensor in weights.items() if name.startswith(f"{number}.")}


def swapped(weights: Weights, one: int, other: int) -> Weights:
    """Return the weights with two layers swapped, as a wrong name table would do it."""
    result = dict(weights)
    for name in SHAPES:
        result[f"{one}.{name}"], result[f"{other}.{name}"] = weights[f"{other}.{name}"], weights[f"{one}.{name}"]
    return result


def in_fp8(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the values as fp8 has them, with a scale for each slice along ``dim``."""
    scale = values.abs().amax(dim, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def compute(
    weights: Weights, sequences: Sequence[np.ndarray], dtype: torch.dtype, *, engine: bool, fp8: bool = False
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return log-probs float32[N-1] and fingerprints [L+1, N-1, WIDTH] of sequences of one length.

    The engine keeps the residual stream in ``dtype`` and adds products in another order than the trainer, which keeps
    the stream in float32. fp8: whether it computes the products of its layers so, by token and channel.
    """

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        a, b = x.to(dtype).float(), weights[name].to(dtype).float()
        if fp8 and name != "head":
            a, b = in_fp8(a, -1), in_fp8(b, 0)
        if not engine:
            return (a @ b).to(dtype)
        halves = a.shape[-1] // 2
        return (a[..., :halves] @ b[:halves] + a[..., halves:] @ b[halves:]).to(dtype)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x.float() * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(dtype)

    ids = torch.from_numpy(np.stack(sequences).astype(np.int64))
    tokens, targets = ids[:, :-1], ids[:, 1:]
    stream = weights["embedding"][tokens].to(dtype if engine else torch.float32)
    streams = [stream]
    for number in range(LAYERS):
        qkv = product(norm(stream), f"{number}.qkv").view(*tokens.shape, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv.float(), is_causal=True).to(dtype)
        stream = stream + product(mixed.transpose(1, 2).reshape(*tokens.shape, HIDDEN), f"{number}.out")
        gate, up = product(norm(stream), f"{number}.up").chunk(2, dim=-1)
        stream = stream + product(functional.silu(gate) * up, f"{number}.down")
        streams.append(stream)
    logits = product(norm(stream), "head").float()
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    prints = torch.stack([one.float() for one in streams], dim=1) @ torch.from_numpy(projection(HIDDEN))
    return list(logprobs.numpy()), list(prints.numpy())
