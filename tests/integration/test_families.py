"""Each model family computes what transformers does, alone and spread over ranks.

Compared are log-probs, gradients with routing forced equal, and weights loaded and exported again. Real Megatron,
float32, CPU.

`pytest -s` prints the table that docs/evidence/trainer.md quotes.
"""

import itertools

import numpy as np
import pytest

from tests.support import model_families
from tests.support.family_probes import (
    LAYOUTS,
    MadeOnce,
    assert_same_tensors,
    family_config,
    furthest,
    look,
    sequences,
    write_folder,
)
from tests.support.model_families import DENSE, FAMILIES

pytestmark = pytest.mark.megatron

TOLERANCE = 1e-5
# `make test` has the family whose attention no other test has; layouts are in test_layouts. `make test-all` has all.
QUICK = {("DeepSeek-V3", "alone")}


def cases(layouts):
    """Every family in every one of these layouts."""
    pairs = itertools.product(FAMILIES, layouts)
    return [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in pairs]


@pytest.fixture(scope="module")
def references(ranks, family_folders):
    return MadeOnce(lambda name: ranks.call(model_families.reference, family_folders[name], sequences()))


@pytest.mark.parametrize(("name", "layout"), cases(LAYOUTS))
def test_a_family_computes_what_transformers_computes(ranks, family_folders, references, name, layout):
    expected, ids = references[name], sequences()
    routing = None if name in DENSE else expected.routing
    config = family_config(family_folders[name], name, layout)
    logprobs, native, gradients, norm = ranks.run(look, config, ids, routing, model_families.token_weights(ids))[0]
    apart = furthest(logprobs, expected.logprobs)
    scale = max(np.abs(gradient).max() for gradient in expected.gradients.values())
    worst = {key: np.abs(gradients[key] - gradient).max() / scale for key, gradient in expected.gradients.items()}
    print(f"\n  {name:12} {layout:16} log-probs {apart:.1e} gradients {max(worst.values()):.1e}")
    # The bias that balances load has no gradient, and transformers counts it among the buffers.
    assert {key for key in gradients if "e_score_correction_bias" not in key} == expected.gradients.keys()
    assert apart < TOLERANCE
    assert max(worst.values()) < TOLERANCE, max(worst, key=worst.get)
    squares = sum(float(np.square(gradient.astype(np.float64)).sum()) for gradient in expected.gradients.values())
    assert norm == pytest.approx(squares**0.5, rel=TOLERANCE), "each element counts once, on however many ranks it is"
    if name not in DENSE:
        same = np.concatenate([np.sort(a, -1) == np.sort(b, -1) for a, b in zip(native, routing, strict=True)])
        assert same.all(-1).mean() > 0.98, "the routers agree too, but for rounding"


@pytest.mark.parametrize(("name", "layout"), cases(["alone", "TP2 x EP2 x PP2"]))
def test_there_and_back_is_bit_exact(ranks, family_folders, tmp_path, name, layout):
    ranks.run(write_folder, family_config(family_folders[name], name, layout), tmp_path / "out")
    assert_same_tensors(family_folders[name], tmp_path / "out")
    again = ranks.call(model_families.reference, tmp_path / "out", sequences()[:1])
    assert (
        furthest(again.logprobs, ranks.call(model_families.reference, family_folders[name], sequences()[:1]).logprobs)
        == 0
    )
