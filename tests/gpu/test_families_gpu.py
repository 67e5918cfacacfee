"""Each model family with Transformer Engine on one GPU against transformers on the CPU."""

import numpy as np
import pytest

from tests.support import model_families
from tests.support.family_probes import TF32_TOLERANCE
from tests.support.model_families import DENSE, FAMILIES, VOCAB
from tests.support.ranks import Ranks, run_config

pytestmark = [pytest.mark.gpu, pytest.mark.needs(1), pytest.mark.usefixtures("gpus")]


def logprobs(trainer, ids, routing):
    return trainer.logprobs(ids, routing)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_transformers_computes(name, tmp_path):
    rng = np.random.default_rng(5)
    ids = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (7, 100, 2, 33)]
    with Ranks(1) as ranks:
        ranks.call(model_families.make, name, tmp_path / "model")
        expected = ranks.call(model_families.reference, tmp_path / "model", ids)
        config = run_config(tmp_path / "model", resources__device="cuda", data__max_prompt_tokens=200)
        routing = None if name in DENSE else expected.routing
        (found,) = ranks.run(logprobs, config, ids, routing)
    for a, b in zip(found, expected.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=TF32_TOLERANCE)
