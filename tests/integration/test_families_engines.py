"""The trainer's exports load in every engine, which computes the log-probs and the routing that transformers does, and
so do weights that are pushed after that.

Real engines on the CPU, float32, one after another. Latent attention runs in vLLM as ordinary attention
(VLLM_MLA_DISABLE), because its own kernels take bfloat16 alone. Moonlight is left out: this CPU engine computes its
plain rotary embeddings in another way.
"""

import importlib.util

import numpy as np
import pytest

from tests.support import model_families
from tests.support.engine_checkpoint import engine_config, score_after_pushes
from tests.support.family_probes import write_folder
from tests.support.model_families import DENSE, VOCAB
from tests.support.ranks import run_config

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.slow]

# Every family, with tied embeddings too where engines have that. Qwen3-MoE without is what the engines' own tests push
# to. SGLang is refused with what CHANGES replaces, and with latent attention on a CPU.
CASES = [
    ("vllm", "Llama", True),
    ("vllm", "Qwen3", True),
    ("vllm", "Qwen3", False),
    ("vllm", "Qwen3-MoE", True),
    ("vllm", "Mixtral", True),
    ("vllm", "Mixtral", False),
    ("vllm", "DeepSeek-V3", False),
    ("vllm", "GLM-4 MoE", False),
    ("sglang", "Llama", True),
    ("sglang", "Qwen3", True),
    ("sglang", "Qwen3-MoE", False),
    ("sglang", "Mixtral", False),
    ("sglang", "GLM-4 MoE", False),
]
# A dense layer among those with experts, and heads whose size is not that of the hidden state over their number.
CHANGES = {
    ("sglang", "Qwen3-MoE"): {"mlp_only_layers": []},
    ("sglang", "Mixtral"): {"head_dim": 32, "hidden_size": 128},
}
PUSHES = 3


@pytest.mark.parametrize(
    ("kind", "name", "tied"), CASES, ids=[f"{kind}-{name}-{'tied' if tied else 'untied'}" for kind, name, tied in CASES]
)
def test_an_export_and_each_push_after_it_compute_the_same(ranks, tmp_path, monkeypatch, kind, name, tied):
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    rng = np.random.default_rng(5)
    ids = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (7, 100, 33)]
    ranks.call(model_families.make, name, tmp_path / "model", 0, tied, CHANGES.get((kind, name)))
    expected = ranks.call(model_families.reference, tmp_path / "model", ids)
    sizes = {"trainer__parallel__tp": 2, "trainer__parallel__pp": 2}
    if name not in DENSE:
        sizes["trainer__parallel__ep"] = 2
    ranks.run(write_folder, run_config(tmp_path / "model", **sizes), tmp_path / "out")
    folders = [tmp_path / f"pushed{push}" for push in range(PUSHES)]
    weights = [model_families.changed(tmp_path / "out", folder, push) for push, folder in enumerate(folders)]
    assert ("lm_head.weight" in weights[0]) is not tied
    expected_after = [ranks.call(model_families.reference, folder, ids) for folder in folders]

    config = engine_config(tmp_path / "out", runs=tmp_path / "runs", engine=kind)
    loaded, *pushed = score_after_pushes(config, ids, weights).scores
    agree(name, loaded, expected, 1e-5)
    for before, after, reference in zip([loaded, *pushed], pushed, expected_after, strict=False):
        assert all(np.abs(a.logprobs - b.logprobs).mean() > 0.01 for a, b in zip(before, after, strict=True))
        agree(name, after, reference, 5e-5)


def agree(name, scored, expected, tolerance):
    for found, logprobs, routing in zip(scored, expected.logprobs, expected.routing, strict=True):
        np.testing.assert_allclose(found.logprobs, logprobs, atol=tolerance)
        if name not in DENSE:
            assert (np.sort(found.routed_experts, -1) == np.sort(routing, -1)).all(-1).mean() > 0.98
