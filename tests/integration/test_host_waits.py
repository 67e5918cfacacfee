"""The host asks for a value of the device a number of times that does not grow with the layers.

On a GPU each such question waits for all that was launched. Counted on a CPU, where Megatron's modules that are not
fused ask more often than those of a GPU: these are told apart by their files.
"""

import collections
import traceback
from pathlib import Path

import numpy as np
import pytest

from tests.support.layouts import SPEC, config_of, make_checkpoint, make_groups, without_routing

pytestmark = pytest.mark.megatron

# Megatron's rotary embedding of packed sequences (fused on GPUs), its experts one by one and its sorting of tokens by
# expert (grouped and fused on GPUs).
UNFUSED = {"rope_utils.py", "experts.py", "moe_utils.py", "token_dispatcher.py"}


def make_layers(folder, layers):
    make_checkpoint(folder, layers, dense=())


def questions(trainer, groups):
    """Return how often each file has asked for a value in an update, and in a pass of log-probs with routing."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = collections.Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "equal"):
                frames = [frame.filename for frame in traceback.extract_stack()]
                files = [Path(name).name for name in frames if "/megatron/" in name or "/async_rl/" in name]
                # The device seam stands between, which redirects calls that name a GPU.
                asked[[name for name in files if name != "platform.py"][-1]] += 1
            return func(*args, **(kwargs or {}))

    ids = np.arange(20, dtype=np.int32)
    layers = len(trainer._model_config.moe_layers)
    rows = np.random.default_rng(0).random((19, layers, SPEC.num_experts)).argsort(-1)[..., : SPEC.top_k]
    with Counting():
        trainer.logprobs([ids], [rows.astype(np.uint8)])
        trainer.train_step(groups, version=4, oldest_version=3)
    return asked


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_nothing_of_ours_asks_the_device_in_each_layer(ranks, tmp_path, recompute):
    found = []
    # R2 records what each router chooses, whatever their number, and replays it.
    settings = {"trainer__router_replay": "R2", "trainer__recompute": recompute, "trainer__verify_replay_steps": 0}
    groups = [without_routing(group) for group in make_groups(count=2)]
    for layers in (2, 4):
        ranks.call(make_layers, tmp_path / str(layers), layers)
        found.append(ranks.run(questions, config_of(tmp_path / str(layers), {}, **settings), groups)[0])
    few, many = found
    grown = {name for name in many if many[name] > few[name]}
    assert grown <= UNFUSED, (few, many)
    assert "rope_utils.py" in grown, "the counter sees what Megatron asks in each layer"
    assert sum(few[name] for name in few if name not in UNFUSED) < 60
