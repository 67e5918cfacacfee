"""Environment hosts: real processes that run a user's class, what ends them, and that nothing is left of them."""

import asyncio
import os
import sys
from pathlib import Path

import msgpack
import numpy as np
import psutil
import pytest

from async_rl.config.loading import validate
from async_rl.doctor.inputs import functions
from async_rl.errors import AgentFailure
from async_rl.rollout.environments import hosts
from async_rl.rollout.environments.instance import Failed
from tests.support.played import MODULE, Says, call, environments, play, summed
from tests.support.processes import alive
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_replica import ListQueue, push, sampled, scripted, worker

ROOT = Path(__file__).resolve().parents[2]


def family():
    """What this process has started and is not over, by id."""
    return {child.pid for child in psutil.Process().children(recursive=True) if alive(child)}


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Give environments a log, and see that processes and descriptors are those from before the test."""
    monkeypatch.setenv("ENVIRONMENTS_LOG", str(tmp_path / "log"))
    before, opened = family(), psutil.Process().num_fds()
    yield
    assert family() <= before
    assert psutil.Process().num_fds() <= opened + 2  # those of the loop, which pytest keeps


def logged(tmp_path):
    return [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]


def processes_of(tmp_path):
    return {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}


async def test_many_environments_run_in_one_host(tmp_path):
    async with environments("CountingAsync") as subject:
        await subject.start()
        played = await asyncio.gather(*(play(subject, Says(), name=f"0-{i}") for i in range(50)))
        assert [summed(each) for each in played] == [{"reward": 1.5, "turns": 3.0}] * len(played)
    assert len(processes_of(tmp_path)) == 1
    assert str(os.getpid()) not in processes_of(tmp_path)
    assert sorted(logged(tmp_path)) == ["close"] * 50 + ["setup"] * 50
    assert not subject._hosts.lost


async def test_a_host_finds_modules_in_the_order_of_its_worker(tmp_path, monkeypatch):
    (tmp_path / "msgpack.py").write_text("raise ImportError('another copy')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    async with environments("Counting") as subject:
        await subject.start()


async def test_environments_are_spread_over_hosts(tmp_path):
    async with environments("Counting", hosts=3) as subject:
        await asyncio.gather(*(play(subject, Says(), name=f"0-{i}") for i in range(9)))
    assert len(processes_of(tmp_path)) == 3


async def test_tools_are_used_in_a_host():
    policy = Says(
        call("put", {"title": "A"}), call("scan", {"what": "large"}), call("scan", {"what": "bytes"}), call("burn", {})
    )
    async with environments("Shelf", tool_answer_chars=10) as subject:
        assert summed(await play(subject, policy)) == {"reward": 1.0, "kept": 1.0}
        with pytest.raises(Failed, match="its tool crash raised KeyError: 'bug'") as raised:
            await play(subject, Says(call("crash")))
    assert 'raise KeyError("bug")' in raised.value.trace
    told = [content for _, content in policy.heard]
    assert told[:2] == [
        "1 books, l\n[cut here: 13 characters are more than the 10 that are shown]",
        "x" * 10 + "\n[cut here: 10000000 characters are more than the 10 that are shown]",
    ]
    assert told[2:] == ["\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} ok", "Error: burn needs the argument title"]


@pytest.mark.parametrize("stage", ["setup", "step", "reward", "close"])
async def test_a_host_that_is_killed_costs_its_own_rollouts_and_is_started_again(stage, tmp_path):
    async with environments("CountingAsync", hosts=2) as subject:
        await asyncio.gather(*(play(subject, Says(), name=f"0-{i}") for i in range(2)))  # Both are there now.
        waits = Waits()
        lives = asyncio.create_task(play(subject, waits, name="0-5"))
        await until(lambda: subject.open == 1)
        dies = asyncio.create_task(play(subject, Says(), {stage: "dies"}, name="0-6"))
        if stage == "close":
            assert (await dies).reward == 1.5
        else:
            with pytest.raises(
                Failed, match=r"with its environment host, which ended with status 137; its output ends with: the last"
            ):
                await dies
        waits.go.set()
        assert (await lives).reward == 1.5
        assert (await play(subject, Says(), name="0-7")).reward == 1.5
        assert subject._hosts.lost == {"died": 1}
    assert len(processes_of(tmp_path)) in (2, 3)


class Waits(Says):
    """Says nothing until ``go``."""

    def __init__(self):
        super().__init__()
        self.go = asyncio.Event()

    async def chat(self, messages, tools=None):
        await self.go.wait()
        return await super().chat(messages, tools)


WRONG = {
    "hangs": "has not ended after 2 s",
    "raises": r"raised ValueError: no such board \?",
    "exits": "raised SystemExit: 3",
}


@pytest.mark.parametrize("name", ["Counting", "CountingAsync"])
async def test_what_goes_wrong_in_a_stage_costs_one_rollout(name, tmp_path):
    async with environments(name, setup_s=2.0, step_s=2.0, score_s=2.0) as subject:
        await subject.start()
        for stage in ("setup", "step", "reward"):
            for how, match in WRONG.items():
                with pytest.raises(Failed, match=match):
                    await play(subject, Says(), {stage: how})
                assert (await play(subject, Says())).reward == 1.5
        assert subject.counts.late == {"setup": 1, "step": 1, "score": 1}
        assert not subject._hosts.lost
    assert logged(tmp_path) == ["setup", "close"] * 18
    assert len(processes_of(tmp_path)) == 1


@pytest.mark.parametrize("name", ["Counting", "CountingAsync"])
async def test_a_host_in_which_environments_do_not_close_gets_no_more_of_them(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "MAX_ABANDONED", 2)
    async with environments(name, close_s=0.2) as subject:
        for _ in range(2):
            assert (await play(subject, Says(), {"close": "hangs"})).reward == 1.5
        await play(subject, Says())
        assert subject.counts.late == {"close": 2}
        assert subject._hosts.lost == {"abandoned": 1}
    assert len(processes_of(tmp_path)) == 2


async def test_a_host_whose_loop_is_blocked_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "PING_S", 1.0)
    async with environments("CountingAsync", step_s=1.0) as subject:
        await subject.start()
        waits = Waits()
        beside = asyncio.create_task(play(subject, waits, name="0-5"))
        await until(lambda: logged(tmp_path) == ["setup"] if (tmp_path / "log").exists() else False)
        with pytest.raises(Failed, match="its step has not ended"):
            await play(subject, Says(), {"step": "blocks"})
        waits.go.set()
        with pytest.raises(Failed, match="which answered nothing: an async method blocks there"):
            await beside
        (blocked,) = processes_of(tmp_path)
        await until(lambda: int(blocked) not in family())
        assert (await play(subject, Says())).reward == 1.5
        assert subject._hosts.lost == {"silent": 1}


@pytest.mark.parametrize("end", ["of itself", "cancel", "killed"])
async def test_nothing_that_an_environment_starts_is_left(end, tmp_path):
    async with environments("Counting") as subject:
        if end == "of itself":
            await play(subject, Says(), {"step": "leaves"})
        running = asyncio.create_task(play(subject, Waits(), {"setup": "leaves"}))
        await until(lambda: "setup" in logged(tmp_path) if (tmp_path / "log").exists() else False)
        await until(lambda: len(family()) >= 3)
        if end == "killed":
            os.kill(int(processes_of(tmp_path).pop()), 9)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


WORKER = """
import asyncio, sys
from tests.support.played import Says, environments, play

async def main():
    async with environments("Counting", hosts=2) as subject:
        row = {"step": "hangs", "setup": "leaves"}
        await asyncio.gather(*(play(subject, Says(), row, name=f"0-{i}") for i in (1, 2)))

asyncio.run(main())
"""


async def test_hosts_end_with_their_worker(tmp_path):
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, cwd=ROOT)
    await until(lambda: logged(tmp_path) == ["setup"] * 2 if (tmp_path / "log").exists() else False)
    await until(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 6)
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    await process.wait()
    await until(lambda: not any(alive(child) for child in left))


@pytest.mark.parametrize("ends", [True, False])
async def test_what_runs_in_a_host_is_put_away_before_it_ends(ends, tmp_path, monkeypatch):
    if not ends:
        monkeypatch.setattr(hosts, "LEAVE_S", 0.2)
    async with environments("Serves", arguments={"ends": ends}) as subject:
        await subject.start()
    assert (tmp_path / "log").exists() == ends


# -- interpreters --


def interpreter(folder, *options):
    """Write an interpreter that has the standard library alone, unless PYTHONPATH has more."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {" ".join(options)} "$@"\n')
    path.chmod(0o755)
    return str(path)


async def test_a_class_runs_under_another_interpreter_that_has_msgpack_alone(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "msgpack").symlink_to(Path(msgpack.__file__).parent)
    (tmp_path / "lib" / "foreign_world.py").write_text(
        "import importlib.util, sys\n"
        "from async_rl.rollout.environments.interface import Step\n"
        "HEAVY = ('numpy', 'pydantic', 'structlog', 'torch', 'transformers', 'vllm')\n"
        "class World:\n"
        "    def setup(self, task, context):\n"
        "        assert not any(importlib.util.find_spec(name) for name in HEAVY), sys.path\n"
        "        return 'hi'\n"
        "    def step(self, message):\n"
        "        return Step(reward=len(sys.modules), done=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    async with environments("foreign_world:World", python=interpreter(tmp_path)) as subject:
        assert 0 < (await play(subject, Says())).reward < 400


async def test_a_host_of_this_interpreter_imports_nothing_heavy():
    async with environments("Modules") as subject:
        policy = Says()
        await play(subject, policy)
    found = set(policy.asked[0][0]["content"].split())
    assert {"msgpack", "async_rl"} <= found
    assert not found & {"numpy", "pydantic", "ray", "structlog", "torch", "transformers", "vllm"}


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("Counting", None, r"under /no/python \(rollout\.agent\.python\) did not start: /no/python: No such file"),
        (
            "Counting",
            ("-I",),
            r"did not start: \S+ has no msgpack, which environments need; run \S+ -m pip install msgpack",
        ),
        ("no_such_module:C", (), r"there is no module 'no_such_module' for "),
        ("Absent", (), r"has no class 'Absent'; it has Counting"),
        ("tests.support.broken_environments:C", (), r"importing 'tests\.support\.broken_environments' raised"),
    ],
)
async def test_a_host_that_cannot_start_says_why(name, options, match, tmp_path, monkeypatch):
    python = "/no/python" if options is None else interpreter(tmp_path, *options) if options else None
    async with environments(name, python=python) as subject:
        with pytest.raises(AgentFailure, match=rf"rollout\.agent\.environment \S+: .*{match}"):
            await subject.start()
        with pytest.raises(Failed, match=match):
            await play(subject, Says())
        assert not subject._hosts.lost


def test_the_doctor_starts_a_host():
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for name, status in (("Counting", "ok"), ("Absent", "FAIL")):
        config = validate({**tree, "rollout": {"agent": {"environment": f"{MODULE}:{name}"}}})
        (found,) = [check for check in functions(config) if check.name == "rollout.agent.environment"]
        assert found.status == status


async def test_a_host_has_no_token_of_the_run(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    async with environments("Modules", arguments={"names": "environment"}) as subject:
        policy = Says()
        await play(subject, policy)
    assert "ENVIRONMENTS_LOG" in policy.asked[0][0]["content"]
    assert "RAY_AUTH_TOKEN" not in policy.asked[0][0]["content"]


# -- in a worker --


class TurnEngine(ScriptedEngine):
    """Ends each turn after six tokens; tokens from 90 on are not the policy's."""

    def last_position(self, trajectory_id, response):
        others = [i for i, token in enumerate(response) if token >= 90]
        return (others[-1] + 1 if others else 0) + 5


def replica(engine, queue, name, mode="resume", at_once=4, **agent):
    rollout = {"n": 2, "max_num_seqs": at_once, "max_response_tokens": 40}
    rollout["agent"] = {"environment": f"{MODULE}:{name}", **agent}
    subject, digits = worker(engine, queue, mode, rollout=rollout)
    digits.encode = lambda text, add_special_tokens=False: [90 + ord(c) % 10 for c in text]
    return subject


@pytest.mark.parametrize("mode", ["resume", "in_flight", "drain"])
async def test_a_worker_trains_on_what_its_environments_are_worth(mode, tmp_path):
    engine, queue = scripted(kind=TurnEngine), ListQueue(2)
    subject = replica(engine, queue, "Wordless", mode)
    run = asyncio.create_task(subject.run())
    await sampled(engine, 10)
    await push(subject, engine)
    await run
    await subject.shutdown()
    assert len(queue.groups) == 2
    for rollout in (rollout for group in queue.groups for rollout in group.rollouts):
        (one,) = rollout.trajectories
        assert (rollout.reward, rollout.end, rollout.metrics) == (3.0, "done", {"turns": 3.0})
        assert one.response_ids[~one.sampled].tolist() == [90 + ord(c) % 10 for c in "ok"] * 2
        assert int(one.sampled.sum()) == 18
        assert np.isfinite(one.logprobs[one.sampled]).all()


async def test_a_host_that_dies_costs_groups_where_failures_are_skipped():
    queue = ListQueue(2)
    subject = replica(scripted(kind=TurnEngine), queue, "WordlessDies", at_once=2, on_error="skip")
    await subject.run()
    await subject.shutdown()
    # The group that kills it, and one that had a rollout in it at the time.
    failed = dict(queue.failed)
    assert "0-1.0" in failed
    assert set(failed.values()) == {"agent"}
    assert len(failed) + len(queue.groups) == 2
    subject = replica(scripted(kind=TurnEngine), ListQueue(2), "WordlessDies")
    with pytest.raises(AgentFailure, match=r"rollout\.agent\.environment \S+:WordlessDies, prompt 0-\d .*status 137"):
        await subject.run()
    await subject.shutdown()


async def test_a_class_that_cannot_be_imported_fails_the_worker_before_it_takes_groups():
    queue = ListQueue(2)
    subject = replica(scripted(), queue, "Absent", on_error="skip")
    with pytest.raises(AgentFailure, match="has no class 'Absent'"):
        await subject.run()
    await subject.shutdown()
    assert (queue.left, queue.failed) == (2, [])


@pytest.mark.parametrize("inline", [True, False])
async def test_a_worker_that_closes_has_its_environments_close(inline, tmp_path):
    subject = replica(scripted(kind=TurnEngine), ListQueue(2), "WordlessHangs", inline=inline)
    run = asyncio.create_task(subject.run())
    await until(lambda: logged(tmp_path) == ["step"] * 4 if (tmp_path / "log").exists() else False)
    await subject.shutdown()
    await asyncio.gather(run, return_exceptions=True)
    assert sorted(logged(tmp_path)) == ["close"] * 4 + ["step"] * 4
