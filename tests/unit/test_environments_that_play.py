"""Environments that make whole rollouts at the gateway, and the hooks of a class: prepare, and rows for data.train."""

import asyncio
import json
import sys

import pytest

from async_rl.config.loading import validate
from async_rl.errors import AgentFailure
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.prepare import prepare
from tests.support.gateway_parts import served
from tests.support.played import Says, environments, play
from tests.support.playing_environments import Asks

HERE = {"inline": True}


def own(name):
    return f"{Asks.__module__}:{name}"


@pytest.mark.parametrize("where", [HERE, {}], ids=["inline", "host"])
async def test_a_class_makes_a_whole_rollout_at_the_gateway(where):
    Asks.prepared.clear()
    async with environments(own("Asks"), arguments={"how": "cut"}, **where) as subject, served() as behind:
        await subject.start()
        for turns in (2, 4):
            played = await play(subject, behind.policy)
            assert (played.reward, played.truncated) == (0.5, True)
            assert played.metrics == {"turns": 2.0, "prepared": 1.0}
            assert sum(map(len, behind.session.ended_turns)) == turns
        assert behind.session.ways["extended"] == 2
        assert set(subject.counts.seconds) == {"place", "setup", "play", "close"}


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("raises", "its rollout raised ValueError: no such board"),
        ("text", "its rollout returned 'well' of type str; expected a Step"),
    ],
)
async def test_a_rollout_that_fails_is_named(how, match):
    async with environments(own("Asks"), arguments={"how": how}, **HERE) as subject, served() as behind:
        with pytest.raises(Failed, match=match):
            await play(subject, behind.policy)


async def test_a_whole_rollout_cannot_be_continued():
    async with environments(own("Asks"), recovery="replay", **HERE) as subject, served() as behind:
        with pytest.raises(Failed, match="makes whole rollouts itself, which replay cannot continue; set its recovery"):
            await play(subject, behind.policy)


async def test_a_rollout_that_hangs_is_cancelled_with_its_agent():
    async with environments(own("Asks"), arguments={"how": "hangs"}) as subject, served() as behind:
        running = asyncio.create_task(play(subject, behind.policy))
        async with asyncio.timeout(60):
            while "setup" not in subject.counts.seconds:
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert subject.open == 0


@pytest.mark.parametrize("where", [HERE, {}], ids=["inline", "host"])
async def test_a_class_that_cannot_be_prepared_fails_before_the_first_rollout(where):
    async with environments(own("Asks"), arguments={"how": "not prepared", "word": "x"}, **where) as subject:
        with pytest.raises(AgentFailure, match="its prepare raised ValueError: no word x"):
            await subject.start()


async def test_methods_of_these_names_stay_tools():
    policy = Says()
    async with environments(own("Tool"), **HERE) as subject:
        await subject.start()
        await play(subject, policy, {"prompt": [{"role": "user", "content": "a"}]})
    assert [tool["function"]["name"] for tool in policy.tools] == ["prepare", "rows"]


# -- rows --


def config(folder, name="Asks", **settings):
    data = {"train": str(folder / "made" / "train.jsonl"), "eval": str(folder / "eval.jsonl"), **settings}
    agent = {"environment": own(name), "arguments": settings.pop("arguments", {})}
    data.pop("arguments", None)
    return validate({"model": {"path": "m"}, "data": data, "rollout": {"agent": agent}})


def test_the_rows_of_a_class_are_written_where_there_are_none(tmp_path):
    (tmp_path / "eval.jsonl").write_text("mine")
    for _ in range(2):  # The second time, nothing is written.
        prepare(config(tmp_path, arguments={"word": "w"}))
        rows = [json.loads(line) for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
        assert rows == [{"prompt": f"w{number}", "info": {"split": "train"}} for number in range(3)]
    assert (tmp_path / "eval.jsonl").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["eval.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"arguments": {"how": "no rows"}}, r"rollout\.agent\.environment \S+:Asks: has no rows of 'train'"),
        ({"arguments": {"how": "bad rows"}}, "its rows raised KeyError: 'no such split'"),
        ({"name": "Tool"}, "has no class method rows"),
        ({"train": "rows.parquet"}, r"data\.train is \S*rows\.parquet, which is not there; name a file that ends with"),
    ],
)
def test_rows_that_cannot_be_written_are_named(settings, match, tmp_path):
    with pytest.raises(AgentFailure, match=match):
        prepare(config(tmp_path, **settings))
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_rows_need_an_environment(tmp_path):
    tree = {"model": {"path": "m"}, "data": {"train": str(tmp_path / "t.jsonl")}}
    with pytest.raises(AgentFailure, match=r"data\.train is \S*t\.jsonl, which is not there, and no environment plays"):
        prepare(validate(tree))


def named(folder):
    """Settings with an environment for one source and a set, and a source that is answered."""
    paths = {name: str(folder / f"{name}.jsonl") for name in ("played", "answered", "test")}
    (folder / "answered.jsonl").write_text("mine")
    return {
        "model": {"path": "m"},
        "data": {
            "sources": {"played": {"path": paths["played"], "agent": "asks"}, "answered": {"path": paths["answered"]}},
        },
        "eval": {"sets": {"test": {"path": paths["test"], "agent": "asks"}}},
        "rollout": {"agents": {"asks": {"environment": own("Asks"), "arguments": {"word": "w"}}}},
    }


def test_each_source_and_set_gets_the_rows_of_the_environment_that_plays_it(tmp_path):
    prepare(validate(named(tmp_path)))
    for name, split in (("played", "train"), ("test", "eval")):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert {row["info"]["split"] for row in rows} == {split}
    assert (tmp_path / "answered.jsonl").read_text() == "mine"


def test_a_source_that_no_environment_plays_gets_no_rows(tmp_path):
    tree = named(tmp_path)
    (tmp_path / "answered.jsonl").unlink()
    with pytest.raises(AgentFailure, match=r"data\.sources\.answered\.path is \S*answered\.jsonl, which is not there"):
        prepare(validate(tree))
    assert not list(tmp_path.iterdir()), "and nothing was written"


# -- verifiers, where it is not there --


@pytest.fixture
def without_verifiers(monkeypatch):
    from async_rl.rollout.environments.verifiers import Verifiers

    monkeypatch.delitem(sys.modules, "verifiers", raising=False)
    monkeypatch.setattr(Verifiers, "_loaded", {})
    return Verifiers


def test_an_interpreter_without_verifiers_is_named(without_verifiers):
    with pytest.raises(Failed, match=r"has no module verifiers; name one that has it \(rollout\.agent\.python\)"):
        without_verifiers.prepare("wordle")


def test_a_verifiers_without_known_environments_is_named(without_verifiers, tmp_path, monkeypatch):
    (tmp_path / "verifiers.py").write_text("__version__ = '0.9.0'")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Failed, match=r"has no form for verifiers 0\.9\.0; install requirements/verifiers-v1\.txt"):
        without_verifiers.prepare("wordle")


async def test_verifiers_is_not_loaded_beside_the_workers_threads(without_verifiers):
    with pytest.raises(Failed, match=r"leave rollout\.agent\.inline false"):
        await asyncio.to_thread(without_verifiers.prepare, "wordle")
