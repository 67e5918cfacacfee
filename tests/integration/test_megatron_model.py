"""A real Megatron model on the CPU computes what transformers does, and loads and exports checkpoints; its patches."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from async_rl.errors import ModelError
from tests.support.one_rank import Opened, hf_logprobs, sequences
from tests.support.ranks import TIMEOUT_S

pytestmark = pytest.mark.megatron


def megatron_logprobs(path, ids, temperature, tokens_per_microbatch):
    with Opened(path, trainer__tokens_per_microbatch=tokens_per_microbatch) as (trainer, _):
        return trainer.logprobs(ids, temperature=temperature)


@pytest.mark.parametrize("name", ["moe", "pre_softmax", "dense"])
@pytest.mark.parametrize(("temperature", "budget"), [(1.0, 8192), (0.7, 40)])
def test_logprobs_equal_those_of_transformers(ranks, models, name, temperature, budget):
    ids = sequences()
    expected = ranks.call(hf_logprobs, models / name, ids, temperature)
    got = ranks.call(megatron_logprobs, models / name, ids, temperature, budget)
    assert [len(x) for x in got] == [len(x) for x in expected] == [len(x) - 1 for x in ids]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert np.ptp(np.concatenate(expected)) > 1, "degenerate logits prove nothing"


def export_and_compare(path, folder):
    import torch
    from safetensors.torch import load_file

    with Opened(path) as (trainer, _):
        trainer.save_hf(folder)
        source = trainer.weight_source()
        metadata = [(m.name, m.dtype, m.shape) for m in source.metadata()]
        streamed = [(name, t.dtype, tuple(t.shape)) for name, t in source]
        tensors = {name: t.clone() for name, t in source}
    original = load_file(path / "model.safetensors")
    saved = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    same = all(
        set(original) == set(other) and all(torch.equal(original[k], other[k]) for k in original)
        for other in (saved, tensors)
    )
    return same, metadata == streamed, len(metadata) == len(original)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_export_is_the_checkpoint_bit_for_bit(ranks, models, tmp_path, name):
    assert ranks.call(export_and_compare, models / name, tmp_path / "out") == (True, True, True)
    ids = sequences(1)
    assert ranks.call(hf_logprobs, tmp_path / "out", ids)[0] == pytest.approx(
        ranks.call(hf_logprobs, models / name, ids)[0], abs=0
    )


def waits_of_groups(path):
    """Return how many process groups there are, and after how many seconds they give up on a rank."""
    import torch
    from torch.distributed.distributed_c10d import _world

    with Opened(path):
        backends = [group._get_backend(torch.device("cpu")) for group in _world.pg_map]
        return len(backends), {backend.options._timeout.total_seconds() for backend in backends}


def test_every_process_group_gives_up_on_a_dead_rank_after_the_same_time(ranks, models):
    count, waits = ranks.call(waits_of_groups, models / "moe")
    assert count > 10
    assert waits == {15 * 60}


def open_and_close(path):
    with Opened(path):
        pass


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_tensors_named(ranks, models, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(models / "moe", broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    tensors["model.layers.9.extra"] = np.zeros(1, np.float32)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        ranks.call(open_and_close, broken)
    for words in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.norm.weight is [47], expected [48]",
        "model.layers.9.extra is surplus",
    ):
        assert words in str(error.value)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_local_experts": 5, "num_experts": 5}))
    with pytest.raises(ModelError, match=r"experts\.5\.\S+ is surplus|expected \[5, 48\]"):
        ranks.call(open_and_close, broken)


def norms():
    """Return (ours, torch's): output, gradients of input and weight, and whether bfloat16 stays bfloat16."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from async_rl.trainer.megatron.norm import RMSNorm

    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    results = []
    x, upstream, weight = torch.randn(7, 1, 3, 16), torch.randn(7, 1, 3, 16), torch.rand(16)
    for norm in (RMSNorm(config=config, hidden_size=16, eps=1e-3), torch.nn.RMSNorm(16, 1e-3)):
        norm.weight.data.copy_(weight)
        leaf = x.clone().requires_grad_()
        output = norm(leaf)
        output.backward(upstream)
        results.append([t.detach().numpy() for t in (output, leaf.grad, norm.weight.grad)])
    half = RMSNorm(config=config, hidden_size=16).bfloat16()(x.bfloat16())
    return *results, half.dtype is torch.bfloat16


def test_rms_norm_and_its_gradients_are_those_of_torch(ranks):
    ours, expected, keeps_dtype = ranks.call(norms)
    for got, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert keeps_dtype


def what_megatron_lacks():
    import inspect

    import torch
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def fails(call):
        try:
            call()
        except (RuntimeError, AssertionError):
            return True
        return False

    return {
        "current_device": fails(torch.cuda.current_device),
        "te_general_gemm": not hasattr(moe_utils, "te_general_gemm"),
        "recompute_rng": fails(random._get_cuda_rng_state),
        "device_in_words": fails(lambda: torch.zeros([], device="cuda")),
        "rng_tracker": fails(lambda: random.get_cuda_rng_tracker().add("some", 0)),
        "transformer_engine_stand_ins": multi_latent_attention.HAVE_TE,
        "dispatcher_stream": "torch.cuda.Stream()" in inspect.getsource(MoEAlltoAllTokenDispatcher.__init__),
        "pipeline_shapes": "batch_isend_irecv" in inspect.getsource(P2PCommunicator._communicate_shapes),
        # These are fixed in trainer/megatron/model.py and trainer/megatron/attention.py.
        "experts_as_dense": "config.expert_model_parallel_size > 1" in inspect.getsource(layers.ColumnParallelLinear),
        "rotary_key_gradient": "gather_from_tensor_model_parallel_region(kv_combined)"
        in inspect.getsource(multi_latent_attention.MLASelfAttention),
    }


@pytest.mark.slow
def test_every_patch_of_the_device_seam_is_still_needed():
    """Fail once torch or Megatron no longer need one of the patches: then remove it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        lacking = pool.submit(what_megatron_lacks).result(timeout=TIMEOUT_S)
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU: nothing is lacking, and nothing is patched")
    assert lacking == dict.fromkeys(lacking, True)
