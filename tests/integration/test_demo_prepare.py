"""The demo's model and dataset are made once, completely or not at all, and every library loads them."""

import json
import threading
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from async_rl.config.loading import validate
from async_rl.config.schema import RunConfig
from async_rl.demo import checkpoint, task, warmup
from async_rl.demo import prepare as preparing
from async_rl.demo.tokenizer import CHARACTERS, EOS, EOS_ID, TOKENS, UNKNOWN
from async_rl.errors import ModelError
from async_rl.models.config import checkpoint_shards, read_model_config
from async_rl.rollout.rewards.text import partial_credit
from tests.support.datasets import read_files

EVALUATED = 256  # as eval.n has it


def config_in(folder: Path) -> RunConfig:
    return validate(
        {
            "model": {"path": folder / "model", "dtype": "float32"},
            "data": {"train": folder / "train.jsonl", "eval": folder / "eval.jsonl"},
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> RunConfig:
    config = config_in(tmp_path_factory.mktemp("demo"))
    preparing.prepare(config)
    return config


def build_log(config: RunConfig) -> list[int]:
    """Return the modification times of what was made: they change when it is made again."""
    return [path.stat().st_mtime_ns for path in (config.model.path, config.data.train, config.data.eval)]


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


@pytest.mark.slow
def test_the_policy_starts_from_the_reward_of_its_warmup(made):
    """0.256 in float32 before it was packed. Weights that are not those of their names would show here."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # More would spin on a busy machine, and gain nothing with so small a model.
    tokenizer = AutoTokenizer.from_pretrained(made.model.path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(made.model.path, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rows = read_files(
        made.data.eval, encode=tokenizer.encode, prompt_field="prompt", max_prompt_tokens=200, on_bad_row="fail"
    )
    prompts = list(rows.first(EVALUATED, label="eval", key="eval.n"))
    texts = tokenizer([prompt.text for prompt in prompts], return_tensors="pt", padding=True, padding_side="left")
    inputs = {key: texts[key] for key in ("input_ids", "attention_mask")}
    answers = model.generate(**inputs, do_sample=False, max_new_tokens=task.MAX_RESPONSE_TOKENS)
    responses = tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = [partial_credit(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
    assert sum(rewards) / EVALUATED == pytest.approx(0.256, abs=0.02)


def test_a_second_call_makes_nothing(made, monkeypatch):
    before = build_log(made)
    monkeypatch.setattr(checkpoint, "unpack", lambda _: pytest.fail("unpacked again"))
    preparing.prepare(made)
    assert build_log(made) == before
    assert not [path for path in made.model.path.parent.iterdir() if path.name.endswith(".building")]


def test_of_two_callers_at_once_one_builds(tmp_path, monkeypatch):
    config, unpacked = config_in(tmp_path), []
    unpack = checkpoint.unpack
    monkeypatch.setattr(checkpoint, "unpack", lambda folder: (unpacked.append(folder), unpack(folder)))
    callers = [threading.Thread(target=preparing.prepare, args=(config,)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(unpacked) == 1
    assert checkpoint_shards(config.model.path)


def test_a_torn_folder_and_a_changed_file_are_made_again(made):
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


def test_what_another_recipe_made_is_made_again(made, monkeypatch):
    monkeypatch.setattr(preparing, "_recipe", lambda: "another")
    before = build_log(made)
    preparing.prepare(made)
    assert all(old != new for old, new in zip(before, build_log(made), strict=True))


def test_files_of_the_users_own_are_left_alone(tmp_path):
    config = config_in(tmp_path)
    config.model.path.mkdir()
    config.data.train.write_text("mine")
    preparing.prepare(config)
    assert list(config.model.path.iterdir()) == []
    assert config.data.train.read_text() == "mine"
    assert len(config.data.eval.read_text().splitlines()) == task.EVAL_ROWS


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1"])
def test_a_package_without_its_checkpoint_is_an_error_and_leaves_nothing(content, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    if content is not None:
        (shipped / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(checkpoint, "FOLDER", shipped)
    config = config_in(tmp_path)
    with pytest.raises(ModelError, match=r"install the package again, or make .* python -m async_rl\.demo\.warmup"):
        preparing.prepare(config)
    assert not config.model.path.exists()
    assert not (tmp_path / "model.building").exists()


def warm_up(folder: Path) -> int:
    """Run in a process of its own: Megatron's state is global."""
    (folder / "model").mkdir()
    steps = warmup.build(folder / "model", max_steps=2)
    checkpoint.pack(folder / "model", folder / "packed", {"steps": steps})
    return steps


@pytest.mark.slow
@pytest.mark.megatron
def test_the_warmup_makes_a_folder_like_the_shipped_one(ranks, tmp_path):
    """Two steps, not until the loss is low enough: only what the folder looks like is compared."""
    assert ranks.call(warm_up, tmp_path) == 2
    assert file_names(tmp_path / "packed") == file_names(checkpoint.FOLDER)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert parsed(tmp_path / "packed" / name) == parsed(checkpoint.FOLDER / name), name
    assert shapes(tmp_path / "packed") == shapes(checkpoint.FOLDER)


def parsed(path: Path) -> dict[str, object]:
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "transformers_version"}


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = load_file(folder / "model.safetensors")
    return {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
