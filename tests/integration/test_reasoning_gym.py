"""reasoning-gym as an environment: the real package, under a Python of its own, and rows that it makes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from async_rl.errors import AgentFailure
from async_rl.rollout.environments.instance import Failed
from tests.support.needs import ENVIRONMENTS_PYTHON, NEEDS_ENVIRONMENTS
from tests.support.played import Says, bare_python, environments, play, summed

ROOT = Path(__file__).resolve().parents[2]
MODULE = "async_rl.rollout.environments.reasoning_gym"
GYM = f"{MODULE}:ReasoningGym"
BACKWARD = {"dataset": "spell_backward", "config": {"seed": 3, "size": 4}, "index": 2}


def python(*arguments):
    """Run the Python that has reasoning-gym; returns the finished process."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([ENVIRONMENTS_PYTHON, *arguments], env=env, text=True, capture_output=True, timeout=300)


def gym(**arguments):
    return environments(GYM, python=str(ENVIRONMENTS_PYTHON), arguments=arguments)


def row(content="?", **problem):
    return {"prompt": [{"role": "user", "content": content}], "reasoning_gym": BACKWARD | problem}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The rows that the command writes for BACKWARD's dataset."""
    out = tmp_path_factory.mktemp("rows") / "new" / "rows.jsonl"
    done = python("-m", MODULE, "spell_backward", "--size", "4", "--seed", "3", "--out", out)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@NEEDS_ENVIRONMENTS
def test_the_command_writes_a_row_for_each_problem(made):
    assert len(made) == 4
    assert made[2]["reasoning_gym"].items() >= BACKWARD.items()
    for each in made:
        word = each["prompt"].rpartition(" ")[2]
        assert each["prompt"].startswith("Spell this word backward")
        assert each["answer"] == word[::-1]


@NEEDS_ENVIRONMENTS
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["spell_backwards"], "reasoning-gym has no dataset 'spell_backwards'; near it are spell_backward"),
        (["word_sorting", "--config", '{"words": 3}'], "the config of word_sorting is .*, which it refuses: TypeError"),
        (
            ["word_sorting", "--config", '{"min_words": 0}'],
            "which it refuses: AssertionError.*min_words must be positive",
        ),
        (
            ["word_sorting", "--config", '{"transformation": "upper"}'],
            "has transformation 'upper'; known are lowercase",
        ),
    ],
)
def test_the_command_says_what_reasoning_gym_does_not_have(arguments, match, tmp_path):
    done = python("-m", MODULE, *arguments, "--out", tmp_path / "rows.jsonl")
    assert done.returncode == 1
    assert re.search(match, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


@NEEDS_ENVIRONMENTS
async def test_an_answer_is_worth_what_the_dataset_says(made):
    right = made[2]["answer"]
    async with gym() as subject:
        policies = [Says(right), Says(right[:-1] + "?"), Says("0"), Says()]
        worth = [summed(await play(subject, policy, made[2] | row(made[2]["prompt"]))) for policy in policies]
    assert worth[0] == {"reward": 1.0, "turns": 1.0, "solved": 1.0, "unscored": 0.0}
    assert worth[1]["reward"] == pytest.approx(1 - 1 / len(right))
    assert [each["reward"] for each in worth[2:]] == [0.0, 0.0]
    assert policies[0].asked == [[{"role": "user", "content": made[2]["prompt"]}]]


@NEEDS_ENVIRONMENTS
async def test_a_wrong_answer_may_be_tried_again_and_the_last_one_counts(made):
    right = made[2]["answer"]
    async with gym(turns=3, again="No.", tag="answer") as subject:
        policy = Says(f"<think>{right}</think>", f"<answer>a</answer> <answer>{right} </answer>")
        worth = summed(await play(subject, policy, row()))
        assert worth == {"reward": 1.0, "turns": 2.0, "solved": 1.0, "unscored": 0.0}
        assert policy.heard == [("user", "No.")]
        tires = Says(f"<answer>{right[:-1]}?</answer>", "a", "b", "c")
        assert summed(await play(subject, tires, row())) == {
            "reward": 0.0,
            "turns": 3.0,
            "solved": 0.0,
            "unscored": 0.0,
        }
        assert (await play(subject, Says(cut=True), row())).reward == 0.0


@NEEDS_ENVIRONMENTS
async def test_a_row_may_have_its_entry_and_text_as_the_prompt():
    entry = {"question": "?", "answer": "b, a", "metadata": {"sorted_words": ["b", "a"]}}
    fields = {"reasoning_gym": {"dataset": "word_sorting", "config": {"transformation": "lowercase"}, "entry": entry}}
    async with gym() as subject:
        policy = Says("b, a")
        assert (await play(subject, policy, fields)).reward == 1.0
        assert policy.raw == [[5, 6, 7]]
        broken = {"reasoning_gym": {"dataset": "word_sorting", "entry": {"answer": "a"}}}
        assert summed(await play(subject, Says("a"), broken))["unscored"] == 1.0


@NEEDS_ENVIRONMENTS
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "the row's field reasoning_gym is None; expected dataset, config, and index or entry"),
        ({"reasoning_gym": {"dataset": "spell_backward"}}, "expected dataset, config, and index or entry"),
        (row(index=4), "the row's problem 4 is none of the 4 of its dataset spell_backward"),
        (row(index="2"), "the row's problem '2' is none of the 4"),
        (
            row(version="0.0.1"),
            r"made with reasoning-gym 0\.0\.1, and 0\.\d+\.\d+ may make another problem of it; make",
        ),
        (row(dataset="spell"), "reasoning-gym has no dataset 'spell'"),
    ],
)
async def test_a_row_without_its_problem_says_what_is_missing(fields, match):
    async with gym() as subject:
        with pytest.raises(Failed, match=match):
            await play(subject, Says(), fields)


async def test_an_interpreter_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    async with environments(GYM, python=bare_python(tmp_path, monkeypatch)) as subject:
        match = r"need the package reasoning-gym: .*; run \S+ -m pip install reasoning-gym$"
        with pytest.raises(AgentFailure, match=match):
            await subject.start()


EVERY = r"""
import json, sys
from async_rl.rollout.environments.reasoning_gym import DATASETS, ReasoningGym, problem, rows

sys.setrecursionlimit(10_000)
for name in sorted(DATASETS):
    try:
        for row in json.loads(json.dumps(list(rows(name, {"seed": 1, "size": 2})))):
            dataset, entry = problem(row["reasoning_gym"])
            assert entry["question"] == row["prompt"], "another problem"
            subject = ReasoningGym(turns=2)
            subject.dataset, subject.entry = dataset, entry
            if not subject.step({"content": "no such answer"}).done and row["answer"] is not None:
                subject.step({"content": str(row["answer"])})
                assert subject.reward() > 0.99, f"its own answer is worth {subject.reward()}"
    except Exception as error:
        print("\nfailed", name, repr(error)[:200])
print("\n", len(DATASETS), "datasets")
"""


@NEEDS_ENVIRONMENTS
@pytest.mark.slow
def test_rows_of_every_dataset_make_the_same_problem_again():
    done = python("-c", EVERY)
    assert done.returncode == 0, done.stderr
    *said, counted = done.stdout.splitlines()  # Some write dots.
    assert int(counted.split()[0]) > 100
    assert [line.split()[1] for line in said if line.startswith("failed")] == ["composite"]
