"""The demo's model and dataset are made once, whole or not at all, and loadable by everybody."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.demo import prepare as preparing
from async_rl.demo import task
from async_rl.demo.tokenizer import CHARACTERS, EOS, EOS_ID, TOKENS, UNKNOWN
from async_rl.errors import ModelError
from async_rl.models.config import checkpoint_shards, read_model_config

# Two steps, not until the loss is low enough: what is tested here does not depend on how good the model is.
BUILDER = """
import sys
from pathlib import Path
from async_rl.demo import warmup

warmup._end_with_parent()
warmup.build(Path(sys.argv[-1]), max_steps=2)
"""


def config_in(folder: Path) -> RunConfig:
    return validate(
        {
            "model": {"path": folder / "model", "dtype": "float32"},
            "data": {"train": folder / "train.jsonl", "eval": folder / "eval.jsonl"},
        }
    )


@pytest.fixture(scope="module")
def quick_builder(tmp_path_factory):
    script = tmp_path_factory.mktemp("builder") / "builder.py"
    script.write_text(BUILDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "WARMUP_COMMAND", (sys.executable, str(script)))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, quick_builder) -> RunConfig:
    config = config_in(tmp_path_factory.mktemp("tiny"))
    preparing.prepare(config)
    return config


def build_log(config: RunConfig) -> list[int]:
    """Modification times of what was made: they change when it is made anew."""
    return [path.stat().st_mtime_ns for path in (config.model.path, config.data.train, config.data.eval)]


pytestmark = pytest.mark.megatron


def test_the_model_is_a_moe_of_two_to_five_million_parameters(made):
    model = read_model_config(made.model.path)
    assert (model.routing_spec.num_moe_layers, model.routing_spec.top_k, model.routing_spec.num_experts) == (4, 2, 8)
    assert model.max_position_embeddings >= task.MAX_PROMPT_TOKENS + task.MAX_RESPONSE_TOKENS
    parameters = sum(path.stat().st_size for path in checkpoint_shards(made.model.path)) / 4
    assert 2e6 < parameters < 5e6


def test_transformers_loads_model_and_tokenizer_offline(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made.model.path, local_files_only=True)
    text = CHARACTERS + " zz, a"
    ids = tokenizer.encode(text)
    assert [TOKENS[i] for i in ids] == list(text), "one character, one token, and no special ones around"
    assert tokenizer.decode([*ids, EOS_ID], skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id, tokenizer.eos_token, len(tokenizer)) == (EOS_ID, EOS, len(TOKENS))
    assert tokenizer.encode("A\n") == [TOKENS.index(UNKNOWN)] * 2
    _, loading = AutoModelForCausalLM.from_pretrained(made.model.path, output_loading_info=True, local_files_only=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_a_second_call_makes_nothing(made, monkeypatch):
    before = build_log(made)
    monkeypatch.setattr(preparing, "WARMUP_COMMAND", ("false",))
    preparing.prepare(made)
    assert build_log(made) == before
    assert not [path for path in made.model.path.parent.iterdir() if path.name.endswith(".building")]


def test_a_torn_folder_and_a_changed_file_are_made_anew(made, tmp_path, monkeypatch):
    # Stands in for the builder, which took its time once: copies what it made to the folder that is asked for.
    shutil.copytree(made.model.path, tmp_path / "copy")
    monkeypatch.setattr(preparing, "WARMUP_COMMAND", ("cp", "-rT", str(tmp_path / "copy")))
    (made.model.path / "tokenizer.json").unlink()
    text = made.data.train.read_text()
    made.data.train.write_text(text[:-5])
    (made.model.path.parent / "model.building").mkdir()  # as an interrupted build leaves it
    untouched = made.data.eval.stat().st_mtime_ns
    preparing.prepare(made)
    assert (made.model.path / "tokenizer.json").is_file()
    assert made.data.train.read_text() == text
    assert made.data.eval.stat().st_mtime_ns == untouched
    assert not (made.model.path.parent / "model.building").exists()


def test_what_another_recipe_made_is_made_anew(made, monkeypatch):
    monkeypatch.setattr(preparing, "_recipe", lambda: "another")
    monkeypatch.setattr(preparing, "WARMUP_COMMAND", ("true",))
    before = build_log(made)
    preparing.prepare(made)
    assert all(old != new for old, new in zip(before, build_log(made), strict=True))


def test_what_somebody_else_put_there_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "WARMUP_COMMAND", ("false",))
    config = config_in(tmp_path)
    config.model.path.mkdir()
    config.data.train.write_text("mine")
    preparing.prepare(config)
    assert list(config.model.path.iterdir()) == []
    assert config.data.train.read_text() == "mine"
    assert len(config.data.eval.read_text().splitlines()) == task.EVAL_ROWS


def test_a_failed_warmup_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "WARMUP_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    config = config_in(tmp_path)
    with pytest.raises(ModelError, match="exit code 3"):
        preparing.prepare(config)
    assert not config.model.path.exists()
    assert not (tmp_path / "model.building").exists()


def test_the_build_ends_with_the_process_that_started_it(tmp_path):
    """Kill the parent while its child builds; the child must go too."""
    parent = f"""
import sys
from pathlib import Path
from async_rl.demo import prepare as preparing
preparing.WARMUP_COMMAND = (sys.executable, "-c", {CHILD!r})
from tests_config import config
preparing.prepare(config)
"""
    (tmp_path / "tests_config.py").write_text(
        "from pathlib import Path\nfrom async_rl.config.loading import validate\n"
        f"root = Path({str(tmp_path)!r})\n"
        "config = validate({'model': {'path': root / 'model'}, 'data': {'train': root / 't.jsonl'}})\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path) as process:
        pid = json.loads(_wait_for(tmp_path / "model.building" / "pid"))
        process.kill()
    deadline = time.monotonic() + 15
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


CHILD = """
import os, sys, time
from pathlib import Path
from async_rl.demo import warmup
warmup._end_with_parent()
new = Path(sys.argv[-1]) / "pid.new"
new.write_text(str(os.getpid()))
new.rename(Path(sys.argv[-1]) / "pid")
time.sleep(60)
"""


def _wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return path.read_text()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child whose parent was killed may stay a zombie where nothing reaps it; it runs no more.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
