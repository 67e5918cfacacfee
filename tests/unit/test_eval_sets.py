"""Evaluation sets as settings and files describe them, and what is wrong with one."""

import json

import pytest

from async_rl import doctor
from async_rl.config.loading import load, parse_overrides, validate
from async_rl.config.paths import absolute, path_settings
from async_rl.data import reading
from async_rl.doctor import inputs
from async_rl.driver.evaluation import EvalSet
from async_rl.driver.run import read_eval_sets
from async_rl.errors import ConfigError, DatasetError
from async_rl.metrics.evaluation import EvalRules
from async_rl.rollout.engine.interface import Sampling

AIME = {"path": "aime.jsonl", "k": 4, "temperature": 0.6, "top_p": 0.95, "top_k": 20}


def tree(sets=None, **sections):
    base = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}}
    return {**base, "eval": {"sets": {"aime": AIME} if sets is None else sets}, **sections}


class Letters:
    def text(self, text):
        return list(text.encode())


def write(folder, *rows):
    path = folder / "aime.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def read(folder, *rows, on_bad_row="fail", **settings):
    sets = {"aime": {**AIME, "path": str(write(folder, *rows)), **settings}}
    config = validate(tree(sets, data={"train": "train.jsonl", "on_bad_row": on_bad_row}, runs=str(folder)))
    counted = {}
    (found,) = read_eval_sets(config, Letters(), counted)
    return found, counted


def test_the_held_out_prompts_are_a_set_beside_the_others():
    config = validate(tree(data={"train": "train.jsonl", "eval": "eval.jsonl"}))
    assert list(config.eval_sets) == ["held_out", "aime"]
    held_out = config.eval_sets["held_out"]
    assert (held_out.limit, held_out.k, held_out.temperature, held_out.pass_sizes) == (256, 1, 0.0, (1,))
    assert config.eval_sets["aime"].pass_sizes == (1, 4)
    assert reading.keys(config) == ["data.train", "data.eval", "eval.sets.aime.path"]
    assert [reading.eval_key(name) for name in config.eval_sets] == reading.keys(config)[1:]
    assert list(validate(tree()).eval_sets) == ["aime"]


def test_the_path_of_a_set_is_a_path_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = absolute(validate(tree()))
    assert dict(path_settings(config))["eval.sets.aime.path"] == tmp_path / "aime.jsonl"
    assert config.eval.sets["aime"].k == 4


def test_a_set_is_changed_on_the_command_line(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(tree()))
    words = ["--eval.sets.aime.k", "8", "--eval.sets.aime.pass_k=[1, 8]", "--eval.sets.mine.path", "7"]
    config = load(tmp_path / "config.yaml", parse_overrides(words))
    assert (config.eval.sets["aime"].k, config.eval.sets["aime"].pass_sizes) == (8, (1, 8))
    assert str(config.eval.sets["mine"].path) == "7"


@pytest.mark.parametrize(
    ("sets", "sections", "parts"),
    [
        ({"aime": {**AIME, "pass_k": [1, 8]}}, {}, ["eval.sets.aime", "aime.jsonl", "pass@8", "k is 4", "at least 8"]),
        ({"aime": {**AIME, "temperature": 0}}, {}, ["eval.sets.aime", "aime.jsonl", "temperature is 0", "k is 4"]),
        ({"aime": {**AIME, "path": "train.jsonl"}}, {}, ["eval.sets.aime.path and data.train", "train.jsonl"]),
        ({"held_out": AIME}, {}, ["held_out", "choose another"]),
        (None, {"checkpoint": {"keep_best": "amie", "every": 5}}, ["keep_best is amie", "aime"]),
        ({}, {"checkpoint": {"keep_best": "held_out", "every": 5}}, ["keep_best is held_out", "set data.eval"]),
        (None, {"checkpoint": {"keep_best": "aime", "every": 5}}, ["keep_best is aime", "eval.every is 0"]),
        ({"aime": {**AIME, "every": 5}}, {"checkpoint": {"keep_best": "aime"}}, ["checkpoint.every is 0"]),
    ],
)
def test_a_set_that_cannot_work_is_refused_with_its_file_and_setting(sets, sections, parts):
    with pytest.raises(ConfigError) as refused:
        validate(tree(sets, **sections))
    assert [part for part in parts if part not in str(refused.value)] == []


def test_problems_are_read_with_their_source_and_the_first_are_shown(tmp_path):
    rows = [{"prompt": name, "data_source": "2024" if name == "a" else 7} for name in "abc"]
    found, counted = read(tmp_path, *rows)
    assert [problem.prompt.prompt_id for problem in found.problems] == ["eval-aime-1", "eval-aime-2", "eval-aime-3"]
    assert [problem.source for problem in found.problems] == ["2024", None, None]
    assert [problem.shown for problem in found.problems] == [True, True, False]
    assert {problem.sampling for problem in found.problems} == {Sampling(0.6, 0.95, greedy=False, top_k=20)}
    assert (found.rules, found.every, counted) == (EvalRules(4, (1, 4), 1.0), 0, {"eval.aime": 0})
    found, _ = read(tmp_path, *rows, limit=1, k=1, temperature=0.0, every=3, source_field="answer")
    assert (len(found.problems), found.every, found.problems[0].source) == (1, 3, None)
    assert found.problems[0].sampling.greedy


@pytest.mark.parametrize(
    ("rows", "settings", "parts"),
    [
        ([{"prompt": "a"}], {"limit": 2}, ["aime.jsonl", "eval.sets.aime.limit asks for 2", "1 usable"]),
        ([], {}, ["eval.sets.aime.path", "aime.jsonl is empty"]),
        (["no json\n", {"promt": "a"}], {"on_bad_row": "skip"}, ["eval.sets.aime.path", "aime.jsonl", "2 of 2 rows"]),
        (["no json\n"], {}, ["eval.sets.aime.path", "aime.jsonl", "line 1"]),
    ],
)
def test_a_file_that_is_no_set_is_refused_with_its_setting(tmp_path, rows, settings, parts):
    with pytest.raises(DatasetError) as refused:
        read(tmp_path, *rows, **settings)
    assert [part for part in parts if part not in str(refused.value)] == []


def test_the_doctor_reads_every_set(tmp_path):
    path = write(tmp_path, {"prompt": "a"})
    config = validate(tree({"aime": {**AIME, "path": str(path), "limit": 2}}, data={"train": str(path) + "2"}))
    (tmp_path / "aime.jsonl2").write_text('{"prompt": "b"}\n')
    found = {check.name: check for check in inputs.data(config)}
    assert "data.eval" not in found, "nothing is missing where there are sets"
    assert found["eval.sets.aime.path"].status == "FAIL"
    assert "eval.sets.aime.limit asks for 2" in doctor.report(list(found.values()))


def test_a_set_is_not_compared_by_its_problems():
    config = validate(tree())
    assert EvalSet.of(config, "aime", []) != EvalSet.of(config, "aime", [])
