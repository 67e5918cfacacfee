"""The chat demo: its mixture computes what the dense model does, its questions are two sets, its reward is no gift."""

import importlib.util

import numpy as np
import pytest

from async_rl.demo.chat import lists, smollm, upcycle
from async_rl.errors import ModelError
from async_rl.types import Prompt

LAYER = "model.layers.0"
CONFIG = {"num_hidden_layers": 1, "hidden_size": 6, "intermediate_size": 8, "mlp_bias": False}


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (2, 1), (8, 4)])
def test_a_mixture_computes_what_its_dense_model_does(experts, top_k):
    rng = np.random.default_rng(3)
    gate, up = rng.normal(size=(2, 8, 6)).astype(np.float32)
    down = rng.normal(size=(6, 8)).astype(np.float32)
    dense = {f"{LAYER}.mlp.{name}_proj.weight": each for name, each in (("gate", gate), ("up", up), ("down", down))}
    config, mixture = upcycle.to_mixture(CONFIG, dense | {"kept": gate}, experts=experts, top_k=top_k, seed=0)
    assert config["intermediate_size"] == 8 // top_k
    assert "mlp_bias" not in config
    assert mixture.pop("kept") is gate
    x = rng.normal(size=6).astype(np.float32)
    moe = f"{LAYER}.block_sparse_moe"
    scores = mixture[f"{moe}.gate.weight"] @ x
    chosen = np.argsort(-scores, kind="stable")[:top_k]
    weights = np.exp(scores[chosen] - scores[chosen].max())
    out = np.zeros(6)
    for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
        w1, w2, w3 = (mixture[f"{moe}.experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
        out += weight * (w2 @ (silu(w1 @ x) * (w3 @ x)))
    assert out == pytest.approx(down @ (silu(gate @ x) * (up @ x)), rel=1e-5)


@pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (6, 3)])
def test_experts_that_cannot_share_the_mlp_are_refused(experts, top_k):
    with pytest.raises(ValueError, match=f"top_k {top_k} must divide the experts"):
        upcycle.to_mixture(CONFIG, {}, experts=experts, top_k=top_k, seed=0)


def test_the_chat_model_s_packages_are_named_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"make train-chat.*requirements/chat\.txt"):
        smollm.find()


def test_the_evaluation_asks_for_things_that_no_training_prompt_asks_for():
    sets = [[row["prompt"][0]["content"] for row in rows] for rows in lists.train_and_eval()]
    train, evaluation = sets
    assert len({*train, *evaluation}) == len(train) + len(evaluation) == 720
    asked = [{word for question in each for word in question.split()} for each in sets]
    assert "fruits" in asked[0] - asked[1]
    assert "cities" in asked[1] - asked[0]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("apples, pears, plums", 1.0),
        (" Apples, pears, red plums.\n", 1.0),
        ("apples, pears", 2 / 3),
        ("apples, pears, plums, figs", 2 / 3),
        ("apples, apples, Apples!", 1 / 3),
        ("Name three fruits, separated by commas, on one line", 0.0),
        ("apples, the fruits, pears", 2 / 3),
        ("apples, pears, something that is no fruit at all", 2 / 3),
        ("apples,, pears", 2 / 3),
        ("1. apples\n2. pears\n3. plums", 0.0),
        ("", 0.0),
        ("a, b, c, d, e, f, g", 0.0),
    ],
)
def test_a_list_is_scored_by_its_length_and_its_items(response, reward):
    row = {"prompt": [{"role": "user", "content": "Name three fruits, separated by commas, on one line."}], "count": 3}
    prompt = Prompt(prompt_id="0/0", text="", token_ids=np.zeros(1, np.int32), row=0, fields=row)
    assert lists.score(prompt, response) == pytest.approx(reward)
