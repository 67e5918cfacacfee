"""The plan of a trainer rank against the tensors of running ranks, in layouts and with settings for memory.

`pytest -s` prints the table that docs/evidence/trainer.md quotes.
"""

import pytest

from async_rl.doctor.estimate import stage_memory
from async_rl.models.config import read_model_config
from async_rl.trainer.parallel import Place
from tests.support.trainer_memory import SIZES, make_model, settings, taken

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

SIZE = SIZES["demo"]
CASES = {
    "alone": {},
    "dp 2": {"parallel": {"dp": 2}},
    "tp 2": {"parallel": {"tp": 2}},
    "dp 2, ep 2": {"parallel": {"dp": 2, "ep": 2}},
    "pp 2, 1 + 3 layers": {"parallel": {"pp": 2, "layers_per_stage": [1, 3]}},
    "cp 2": {"parallel": {"cp": 2}},
    "recompute full": {"recompute": "full"},
    "recompute block of 2": {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "recompute moe": {"recompute": "selective", "recompute_modules": ["moe"]},
}
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    ranks.call(make_model, path, SIZE)
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_each_rank_is_what_its_tensors_take(ranks, folder, name):
    parallel = CASES[name].get("parallel", {})
    sharing = parallel.get("dp", 1)
    changed = CASES[name] | {"groups_per_step": sharing * 4}
    config = settings(folder, SIZE, **changed)
    model = read_model_config(folder)
    found = ranks.run(taken, config)
    off = {}
    for rank, measured in enumerate(found):
        planned = stage_memory(config, model, Place.of(config.trainer.parallel, rank).pp, gpu=False)
        ratios = {
            "parameters": planned.parameters / measured["parameters"],
            "gradients": planned.gradients / measured["gradients"],
            "fixed": planned.fixed / measured["fixed"],
            "passing": (planned.total - planned.fixed) / (measured["peak"] - measured["fixed"]),
            "peak": planned.total / measured["peak"],
        }
        shown = " ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
        print(f"\n  {name:20} rank {rank}: {measured['peak'] / 1e6:6.1f} MB; {shown}")
        off |= {f"{what} of rank {rank}": ratio for what, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE}
    assert not off
