"""The canary on a deep model: what its rounding measures, which faults are told from it, at the start and later.

`pytest -s` prints the table that docs/evidence/routing-replay.md quotes.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import structlog
import torch

from async_rl.config.loading import validate
from async_rl.errors import WeightSyncMismatch
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.interface import Score
from async_rl.weights.canary import CEILING, FLOOR, agrees, tolerance
from async_rl.weights.canary_check import CanaryCheck
from tests.support import deep_model
from tests.support.deep_model import LAYERS, VOCAB, layer, swapped, updated

DENSE = ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_layers=LAYERS,
    num_heads=4, num_kv_heads=4, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
    tie_word_embeddings=False,
)  # fmt: skip
DTYPES = ["float32", "bfloat16", "fp8"]
PROMPTS = [np.arange(i, i + 40, dtype=np.int32) for i in range(4)]


def compute_dtype(dtype):
    return "bfloat16" if dtype == "fp8" else dtype


class Side:
    """An engine, or the trainer, with the weights that it has now."""

    def __init__(self, weights, dtype, *, engine):
        fp8 = dtype == "fp8" and engine
        self._keywords = {"dtype": getattr(torch, compute_dtype(dtype)), "engine": engine, "fp8": fp8}
        self.weights = weights

    def _compute(self, sequences):
        return deep_model.compute(self.weights, sequences, **self._keywords)

    async def score(self, sequences):
        return [Score(logprobs, None) for logprobs in self._compute(sequences)[0]]

    async def logprobs(self, sequences, rows):
        return self._compute(sequences)[0]

    async def fingerprints(self, sequences, rows=None):
        return self._compute(sequences)[1]


class Canary:
    """A CanaryCheck between an engine and a trainer that begin with the same weights."""

    def __init__(self, weights, dtype, canary_tolerance="auto"):
        torch.set_num_threads(1)
        self.engine, self.trainer = (Side(weights, dtype, engine=engine) for engine in (True, False))
        tree = {"model": {"path": "m", "dtype": compute_dtype(dtype)}, "data": {"train": "d"}}
        tree["rollout"] = {"quantization": "fp8_per_channel" if dtype == "fp8" else None}
        self.config = validate({**tree, "sync": {"canary_tolerance": canary_tolerance}})
        self.check = CanaryCheck(self.config, DENSE, self.trainer, SimpleNamespace(on=self.on), PROMPTS)

    async def on(self, replica, call):
        return await call(self.engine)

    async def report(self, engine=None, trainer=None):
        """Give both sides weights and compare. Raises WeightSyncMismatch."""
        self.engine.weights = self.engine.weights if engine is None else engine
        self.trainer.weights = self.trainer.weights if trainer is None else trainer
        return (await self.check.check([0], replay=False)).report


@pytest.fixture(scope="module")
def weights():
    return deep_model.make()


async def test_a_deep_model_in_bfloat16_was_refused_by_the_fixed_tolerance(weights):
    with pytest.raises(WeightSyncMismatch, match="no layer stands out"):
        await Canary(weights, "bfloat16", None).report()


@pytest.mark.parametrize("dtype", DTYPES)
async def test_a_deep_model_passes_at_the_start_and_after_each_update(weights, dtype):
    canary = Canary(weights, dtype)
    first = await canary.report()
    assert canary.check.noise.token == first.max_abs_diff
    for seed in (1, 2, 3):
        weights = updated(weights, 1e-2, seed)
        await canary.report(weights, weights)
    assert canary.check.noise.token == first.max_abs_diff, "the first comparison alone sets the scale"


@pytest.mark.parametrize("dtype", DTYPES)
async def test_swapped_layers_are_refused_at_the_start_and_named(weights, dtype):
    canary = Canary(weights, dtype)
    with pytest.raises(WeightSyncMismatch, match="the first to differ is layer 14"):
        await canary.report(engine=swapped(weights, 14, 15))
    assert canary.check.noise is None


async def test_layers_that_add_little_are_told_from_noise_by_their_fingerprints(weights):
    """As the middle layers of real models: swapped, they move log-probs by no more than rounding may."""
    thin = {n: t * 0.03 if n in ("14.out", "14.down", "15.out", "15.down") else t for n, t in weights.items()}
    canary = Canary(thin, "bfloat16")
    with pytest.raises(WeightSyncMismatch, match=r"differs most in layer 1[45]"):
        await canary.report(engine=swapped(thin, 14, 15))
    assert canary.check.noise is None


@pytest.mark.parametrize("dtype", DTYPES)
async def test_an_output_layer_of_its_own_is_refused_at_the_start(weights, dtype):
    """All layers agree, so only the ceiling tells it from noise."""
    with pytest.raises(WeightSyncMismatch, match=r"output layer|no layer stands out"):
        await Canary(weights, dtype).report(engine={**weights, "head": updated(weights, 0.2)["head"]})


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e-4), ("bfloat16", 0.3), ("fp8", 0.5)])
async def test_a_stale_layer_is_caught_after_the_start(weights, dtype, size):
    canary = Canary(weights, dtype)
    await canary.report()
    new = updated(weights, size)
    with pytest.raises(WeightSyncMismatch, match="differs most in layer 15"):
        await canary.report(engine={**new, **layer(weights, 15)}, trainer=new)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("off", "canary_tolerance", "refused"), [(0.5, "auto", False), (1.5, "auto", True), (0.5, None, True)]
)
async def test_one_token_alone_may_be_off_by_what_a_first_comparison_may_be(
    weights, monkeypatch, dtype, off, canary_tolerance, refused
):
    """As rounding is where training has made a model sharp. ``off`` is in ceilings of a token."""
    canary = Canary(weights, dtype, canary_tolerance)
    if canary_tolerance == "auto":
        await canary.report()
    score, ceiling = canary.engine.score, CEILING[dtype].token
    assert 0.5 * ceiling > FLOOR[dtype].token

    async def sharper(sequences):
        first, *others = await score(sequences)
        first.logprobs[3] -= off * ceiling
        return [first, *others]

    monkeypatch.setattr(canary.engine, "score", sharper)
    if refused:
        with pytest.raises(WeightSyncMismatch, match=r"by .* at token 4 of probe sequence 0"):
            await canary.report()
    else:
        with structlog.testing.capture_logs() as logged:
            await canary.report()
        assert [line["event"] for line in logged] == ["canary_token_beyond_tolerance"]


@pytest.mark.parametrize("dtype", DTYPES)
async def test_table_of_stale_layers(weights, dtype):
    canary = Canary(weights, dtype)
    sound = await canary.report()
    before, after = FLOOR[dtype], tolerance(canary.config, canary.check.noise)
    print(f"\n  {dtype:9s} before {before}, after {after}")
    caught = []
    for size in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, *((0.5, 1.0) if dtype == "fp8" else ())):
        new = updated(weights, size)
        probing = Canary(weights, dtype, 1e9)
        report = sound if size == 0 else await probing.report(engine={**new, **layer(weights, 15)}, trainer=new)
        caught.append(not agrees(report, after))
        print(
            f"  {size:6.0e} max {report.max_abs_diff:.2g} mean {report.mean_abs_diff:.2g}, "
            f"before: {'refused' if not agrees(report, before) else 'passes'}, "
            f"after: {'refused' if caught[-1] else 'passes'}"
        )
    assert caught == sorted(caught)
    assert not caught[0]
    assert caught[-1]
