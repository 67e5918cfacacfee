"""The demo's task: fixed, disjoint, long-tailed, and made of characters that the tokenizer has; and its checkpoint."""

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from async_rl.demo import checkpoint, task, warmup
from async_rl.demo.model import SIZES
from async_rl.demo.tokenizer import CHARACTERS, EOS, TOKENS
from async_rl.rollout.rewards.text import exact_match
from tests.support.datasets import read_files


@pytest.fixture(scope="module")
def sets():
    return task.train_and_eval()


def test_answers_are_the_letters_in_order(sets):
    train, _ = sets
    for problem in train[:100]:
        assert problem.prompt.endswith(">")
        assert problem.answer == "".join(sorted(problem.prompt[:-1]))


def test_warmup_train_and_eval_problems_are_disjoint_and_none_comes_twice(sets):
    train, evaluation = sets
    warmup = list(islice(task.warmup_problems(), 2000))
    assert (len(train), len(evaluation)) == (task.TRAIN_ROWS, task.EVAL_ROWS)
    assert len({*train, *evaluation, *warmup}) == len(train) + len(evaluation) + len(warmup)


def test_the_sets_are_the_same_every_time(sets):
    assert task.train_and_eval() == sets
    assert list(islice(task.warmup_problems(), 50)) == list(islice(task.warmup_problems(), 50))
    assert next(task.problems(1)) != next(task.problems(2))


def test_response_lengths_have_a_long_tail_from_8_to_200_tokens(sets):
    for problems in sets:
        tokens = np.array([len(problem.answer) + 1 for problem in problems])
        assert tokens.min() == 8
        assert tokens.max() == 200
        assert 20 < tokens.mean() < 30
        assert np.median(tokens) < 0.8 * tokens.mean()
        assert (tokens > 2 * tokens.mean()).mean() > 0.08, "one in twelve is twice as long as the mean"


def test_two_of_three_demonstrations_continue_backwards_and_all_are_of_short_problems():
    shown = list(islice(warmup.demonstrations(), 201))
    letters = ["".join(sorted(problem.prompt[:-1])) for problem in shown]
    assert [p.answer for p in shown[::3]] == letters[::3]
    for start in (1, 2):
        assert [p.answer for p in shown[start::3]] == [text + text[::-1] for text in letters[start::3]]
    assert max(map(len, letters)) <= warmup.MAX_LETTERS


def test_only_answer_and_end_of_a_demonstration_are_learned():
    ids, learned = warmup.sequence(task.Problem("ba>", "ab"))
    assert [TOKENS[i] for i in ids] == ["b", "a", ">", "a", "b", EOS]
    assert learned.tolist() == [False] * 3 + [True] * 3


def test_the_script_writes_files_that_the_dataset_reader_takes(tmp_path, sets):
    subprocess.run([sys.executable, "-m", "async_rl.demo.task", str(tmp_path / "data")], check=True, timeout=60)
    dataset = read_files(
        tmp_path / "data" / "eval.jsonl",
        encode=lambda text: [0] * len(text),
        prompt_field="prompt",
        max_prompt_tokens=task.MAX_LETTERS + 1,
        on_bad_row="fail",
    )
    prompt = dataset.first(1, label="eval", key="eval.n")[0]
    assert (prompt.text, prompt.fields["answer"]) == sets[1][0]
    assert exact_match(prompt, sets[1][0].answer) == 1.0
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == sets[0]


def test_the_vocabulary_has_every_character_once(sets):
    assert len(set(TOKENS)) == len(TOKENS) == 32
    assert {character for problem in sets[0] for character in problem.prompt + problem.answer} <= set(CHARACTERS)


def test_the_shipped_checkpoint_was_made_with_the_settings_of_today():
    """After a change of them: python -m async_rl.demo.warmup."""
    assert checkpoint.made_by()["settings"] == warmup.settings()


def test_the_shipped_config_has_the_sizes_of_the_model():
    config = json.loads((checkpoint.FOLDER / "config.json").read_text())
    # transformers has names of its own for two of them.
    found = config | config["rope_parameters"] | {"num_experts": config["num_local_experts"]}
    assert {key: found[key] for key in SIZES} == SIZES


def test_the_shipped_weights_are_those_of_the_config_in_half_precision():
    weights = load_file(checkpoint.FOLDER / "model.safetensors")
    hidden, vocabulary, layers = SIZES["hidden_size"], SIZES["vocab_size"], SIZES["num_hidden_layers"]
    heads, head = SIZES["num_attention_heads"], SIZES["head_dim"]
    keys, width, experts = SIZES["num_key_value_heads"], SIZES["moe_intermediate_size"], SIZES["num_experts"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * head, hidden),
        "self_attn.k_proj.weight": (keys * head, hidden),
        "self_attn.v_proj.weight": (keys * head, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate.weight": (experts, hidden),
    }
    for expert in range(experts):
        layer |= {f"mlp.experts.{expert}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        layer[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    expected = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    expected |= {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float16)}
    assert all(np.isfinite(tensor).all() for tensor in weights.values())


def test_packing_and_unpacking_loses_no_more_than_half_precision_does(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    original = {"a.weight": rng.normal(0, 0.1, (8, 4)).astype(np.float32), "b.weight": np.ones(3, np.float32)}
    model, packed, unpacked = (tmp_path / name for name in ("model", "packed", "unpacked"))
    model.mkdir()
    save_file(original, model / "model-00001.safetensors", metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text("{}")
    (model / "config.json").write_text('{"a": 1}')
    checkpoint.pack(model, packed, {"steps": 3})
    monkeypatch.setattr(checkpoint, "FOLDER", packed)
    unpacked.mkdir()
    checkpoint.unpack(unpacked)
    assert checkpoint.made_by() == {"steps": 3}
    assert sorted(path.name for path in unpacked.iterdir()) == ["config.json", "model.safetensors"]
    for name, tensor in load_file(unpacked / "model.safetensors").items():
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, original[name], rtol=2**-11)
