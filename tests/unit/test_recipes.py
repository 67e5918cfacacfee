"""The recipes for large models fit the clusters that they name, by doctor and by the page that lists them."""

import re
from pathlib import Path

import pytest

from async_rl import doctor
from async_rl.cli import main
from async_rl.config.loading import load
from async_rl.doctor import described
from async_rl.doctor.memory_plan import GB, RANK_RESERVE, ClusterSpec, engine_memory, rank_memory
from async_rl.models.config import read_model_config
from async_rl.trainer.parallel import world_size
from tests.support.model_folders import GLM_4_5_AIR, QWEN3_4B, QWEN3_30B_A3B, QWEN3_235B_A22B, write_config
from tests.unit.test_model_config import MOONLIGHT

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PAGE = (ROOT / "docs" / "how-to" / "large-models.md").read_text()
RECIPES = {
    "qwen3_4b": (QWEN3_4B, ["qwen3_4b"]),
    "qwen3_4b_one_gpu": (QWEN3_4B, ["qwen3_4b", "qwen3_4b_one_gpu"]),
    "moonlight_16b_a3b": (MOONLIGHT, ["moonlight_16b_a3b"]),
    "qwen3_30b_a3b": (QWEN3_30B_A3B, ["qwen3_30b_a3b"]),
    "qwen3_30b_a3b_8_gpus": (QWEN3_30B_A3B, ["qwen3_30b_a3b", "qwen3_30b_a3b_8_gpus"]),
    "glm_4_5_air": (GLM_4_5_AIR, ["glm_4_5_air"]),
    "qwen3_235b_a22b": (QWEN3_235B_A22B, ["qwen3_235b_a22b"]),
}
BILLIONS = {"qwen3_4b": 4.02, "glm_4_5_air": 106.85, "qwen3_235b_a22b": 235.09}


@pytest.fixture(params=RECIPES)
def recipe(request, tmp_path):
    """Name, settings and cluster of a recipe, with the published shape of its model."""
    shape, files = RECIPES[request.param]
    model = write_config(tmp_path / "model", shape)
    paths = [CONFIGS / f"{name}.yaml" for name in files]
    (spec,) = re.findall(r"^# Cluster: (\S+)$", paths[-1].read_text(), re.MULTILINE)
    return request.param, load(paths, {"model.path": str(model)}), ClusterSpec.parse(spec)


def test_a_recipe_can_start_on_the_cluster_that_it_names(recipe):
    _, config, spec = recipe
    found = described.checks(config, spec)
    assert {check.status for check in found} == {"ok"}, doctor.report(found)
    assert {"GPU", "trainer memory", "engine memory", "payloads"} <= {check.name for check in found}


def test_it_cannot_on_a_smaller_one(recipe):
    _, config, spec = recipe
    few = described.checks(config, ClusterSpec(1, 1, spec.name, spec.gb))
    missing = set() if config.resources.share_gpu else {"GPU"}
    assert missing == {check.name for check in few if check.status == "FAIL"}
    small = described.checks(config, ClusterSpec(spec.hosts, spec.gpus, spec.name, 24))
    assert "trainer memory" in {check.name for check in small if check.status == "FAIL"}


def test_where_hosts_have_four_gpus_the_engines_of_the_largest_span_two(tmp_path):
    shape, (name,) = RECIPES["qwen3_235b_a22b"]
    (spec, replicas, size, hosts) = re.findall(
        r"--cluster-spec (\S+) .*\n.*--rollout.replicas (\d) --rollout.tensor_parallel_size (\d) "
        r"--rollout.hosts_per_engine (\d)",
        PAGE,
    )[0]
    settings = {
        "model.path": str(write_config(tmp_path / "model", shape)),
        "rollout.replicas": int(replicas),
        "rollout.tensor_parallel_size": int(size),
    }
    config = load([CONFIGS / f"{name}.yaml"], settings | {"rollout.hosts_per_engine": int(hosts)})
    found = described.checks(config, ClusterSpec.parse(spec))
    assert {check.status for check in found} == {"ok"}, doctor.report(found)
    assert "4 hosts of 1 engine part" in doctor.report(found)
    whole = described.checks(load([CONFIGS / f"{name}.yaml"], settings), ClusterSpec.parse(spec))
    assert "no host has 8 GPUs for an engine" in doctor.report(whole)


def test_the_page_has_the_figures_of_each(recipe):
    name, config, spec = recipe
    model = read_model_config(config.model.path)
    total = (rank_memory(config, model).total + RANK_RESERVE) / GB
    cache = engine_memory(config, model, spec.gb).tokens
    engines = f"{config.rollout.replica_range.min} x {config.rollout.tensor_parallel_size}"
    (row,) = (line for line in PAGE.splitlines() if line.startswith("|") and f"configs/{name}.yaml" in line)
    layout, *cells = (cell.strip() for cell in row.strip("|").split("|")[2:])
    assert cells == [f"{total:.1f}", engines, f"{cache:,}"]
    assert str(spec) == str(ClusterSpec.parse(row.split("|")[2].strip()))
    sizes = config.trainer.parallel
    assert all(getattr(sizes, key) == int(size) for key, size in re.findall(r"([a-z]+)(\d+)", layout))
    needed = world_size(sizes) * config.rank_gpus + config.rollout.replica_range.min * config.engine_gpus
    assert needed <= spec.hosts * spec.gpus


@pytest.mark.parametrize(("kind", "cache"), [(None, None), ("fp8_per_block", None), ("fp8_per_block", "fp8")])
def test_the_page_has_the_figures_of_engines_in_fp8(tmp_path, kind, cache):
    path = CONFIGS / "qwen3_235b_a22b.yaml"
    model = write_config(tmp_path / "model", QWEN3_235B_A22B)
    for gpus in (8, 4):
        changes = {"quantization": kind, "kv_cache_dtype": cache, "tensor_parallel_size": gpus}
        config = load([path], {"model.path": str(model)} | {f"rollout.{key}": value for key, value in changes.items()})
        engine = engine_memory(config, read_model_config(model), 80)
        of_weights, of_cache = ("bfloat16" if each is None else "fp8" for each in (kind, cache))
        row = f"| {of_weights} | {of_cache} | {gpus} | {engine.weights / GB:.1f} | {engine.tokens:,} |"
        assert (row in PAGE) == (gpus == 8 or cache is not None)


def test_the_page_has_the_figures_of_data_parallel_engines(tmp_path):
    rows = re.findall(r"^\| (\S+) \| (\d) \| (\d) \| (\d) \| ([\d.]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for name, tensor, data, *figures in rows:
        (recipe,) = (key for key in RECIPES if name.lower().replace("-", "_") == key)
        model = write_config(tmp_path / f"{recipe}_{tensor}", RECIPES[recipe][0])
        sizes = {"rollout.tensor_parallel_size": int(tensor), "rollout.data_parallel_size": int(data)}
        config = load([CONFIGS / f"{recipe}.yaml"], {"model.path": str(model)} | sizes)
        engine = engine_memory(config, read_model_config(model), 80)
        tokens = engine.tokens, int(data) * engine.tokens
        assert figures == [f"{config.engine_gpus:.0f}", f"{engine.weights / GB:.1f}", *(f"{each:,}" for each in tokens)]


@pytest.mark.parametrize("name", BILLIONS)
def test_the_shapes_have_as_many_parameters_as_published(tmp_path, name):
    from async_rl.doctor.parameters import parameters_of

    model = read_model_config(write_config(tmp_path / "model", RECIPES[name][0]))
    assert parameters_of(model).total / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_every_recipe_of_a_real_model_is_listed():
    listed = {path.stem for path in CONFIGS.glob("*.yaml")} - {"tiny_moe", "chat_moe"}
    assert listed == RECIPES.keys()


def test_doctor_on_the_command_line(tmp_path, capsys):
    model = write_config(tmp_path / "model", QWEN3_30B_A3B)
    arguments = ["doctor", str(CONFIGS / "qwen3_30b_a3b.yaml"), "--model.path", str(model), "--cluster-spec"]
    assert main([*arguments, "2x8xH100-80"]) == 0
    said = capsys.readouterr().out
    assert "2 hosts with 8 x H100 of 80 GB: 1 host of 8 trainer ranks, 1 host of 4 engines" in said
    assert said.endswith("a run can start on this cluster\n")
    assert main([*arguments, "1x8xH100-80"]) == 1
    assert "16 are needed" in capsys.readouterr().out
    assert main([*arguments, "2x8xH100-80", "--sync.backend", "shm"]) == 1
    assert "shm reaches engines on the trainer's host alone" in capsys.readouterr().out
    assert main([*arguments, "2 hosts"]) == 2
    assert "is not HOSTSxGPUSxNAME-GB" in capsys.readouterr().err
    assert main(["doctor", "--cluster-spec", "2x8xH100-80"]) == 2
    assert "write async-rl doctor CONFIG --cluster-spec SPEC" in capsys.readouterr().err
    assert main([*arguments, "2x8xH100-80", "--model.path", "nowhere"]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().out
