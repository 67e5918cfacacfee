"""What the tests of whole runs share: a tiny random model, a dataset, and a recipe."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from real_run import Run
from redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server():
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The demo's model and tokenizer with random weights: the same shapes, without the warm-up."""
    folder = tmp_path_factory.mktemp("model")
    # In a process of its own: transformers and torch would stay loaded in the test process.
    script = (
        "import sys; from pathlib import Path; from async_rl.tiny.model import save_random_model;"
        "from async_rl.tiny.tokenizer import save_tokenizer; folder = Path(sys.argv[1]);"
        "save_tokenizer(folder); save_random_model(folder, 0)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def recipe(tiny_model, tmp_path_factory) -> Path:
    """A small config: 4 groups of 4 per step, responses of up to 120 tokens, pushes after every step."""
    folder = tmp_path_factory.mktemp("recipe")
    subprocess.run([sys.executable, "-m", "async_rl.tiny.task", str(folder)], check=True, capture_output=True)
    tree = {
        "name": "run",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_prompt_tokens": 200,
        },
        "reward": {"function": "async_rl.rollout.rewards.text:partial_credit"},
        "async_training": {"staleness_threshold": 1.0, "max_staleness": 3},
        "rollout": {
            "n": 4,
            "max_response_tokens": 120,
            "max_num_seqs": 16,
            "kv_cache_bytes": 64 * 2**20,
        },
        "trainer": {"steps": 6, "groups_per_step": 4, "optimizer": {"lr": 1e-3}},
        "eval": {"n": 8},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def start_run(recipe, tmp_path):
    """start_run(section__key=value, ...) -> Run; ended with everything below it when the test is over."""
    runs = []

    def start(**settings) -> Run:
        runs.append(Run(recipe, tmp_path, **settings))
        return runs[-1]

    def resume(**settings) -> Run:
        """Start the same run again, to go on."""
        return start(resume=True, **settings)

    start.again = resume
    yield start
    for run in runs:
        run.close()
