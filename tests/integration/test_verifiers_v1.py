"""What environments of verifiers 0.4 have and those of 0.3 have not; ``test_verifiers.py`` has what is the same.

There is no uv on the path, and nothing is left of a host in the user's folders.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from async_rl.config.loading import validate
from async_rl.errors import AgentFailure
from async_rl.rollout.environments.instance import Failed
from async_rl.rollout.environments.play import probe
from async_rl.rollout.environments.prepare import prepare
from tests.support.gateway_parts import Answers
from tests.support.gateway_parts import served as behind_a_gateway
from tests.support.guesses import LIBRARIES, V1, calling
from tests.support.needs import NEEDS_VERIFIERS_V1
from tests.support.played import environments, play
from tests.support.served_agents import of, until

pytestmark = [NEEDS_VERIFIERS_V1, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).resolve().parents[2]
row = V1.row


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Give hosts a home of their own with their log, a path without uv, and what to import."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HOME": path, "PATH": "/usr/bin:/bin", "ENVIRONMENTS_LOG": path / "log"}.items():
            patch.setenv(name, str(value))
        patch.delenv("PYTHONPATH", raising=False)
        patch.syspath_prepend(LIBRARIES)
        yield path


@contextlib.asynccontextmanager
async def host(**arguments):
    agent = V1.agent(**arguments)
    async with environments(agent.pop("environment"), **agent) as subject:
        yield subject


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guess(home):
    short = {"timeout": {"setup": 2.0, "scoring": 2.0}}
    async with host(args={"agent": short}) as subject:
        await subject.start()
        yield subject


def came_up(home):
    log = home / "log"
    return log.read_text().split().count("up") if log.exists() else 0


async def test_the_tasks_own_stop_ends_a_rollout_which_is_scored(guess):
    async with behind_a_gateway() as behind:
        played = await play(guess, behind.policy, row(how="stops", turns=9))
    assert (played.reward, played.truncated, played.metrics["num_turns"]) == (3.25, False, 2.0)


async def test_a_limit_of_the_agent_truncates(home):
    async with host(args={"agent": {"max_turns": 2}}) as subject, behind_a_gateway() as behind:
        played = await play(subject, behind.policy, row(turns=9))
    assert (played.truncated, played.metrics["num_turns"], played.metrics["no_room"]) == (True, 2.0, 0.0)


async def test_a_policy_that_says_nothing_is_scored(guess):
    async with behind_a_gateway(Answers(0)) as behind:
        played = await play(guess, behind.policy, row())
    assert (played.reward, played.truncated) == (5.25, False)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("bad reward", "ended with TaskError: task GuessTask scoring: KeyError: 'board'"),
        ("slow reward", r"was not scored: known, length \(scoring_timeout\)"),
        ("slow setup", r"was not set up in the time that timeout\.setup gives it"),
    ],
)
async def test_a_rollout_without_a_reward_fails(guess, how, match):
    async with behind_a_gateway() as behind:
        with pytest.raises(Failed, match=match):
            await play(guess, behind.policy, row(how=how))


async def test_a_fault_of_the_policys_server_fails_its_rollout(guess):
    call = Answers()
    call.error = RuntimeError("the engine is gone")
    async with behind_a_gateway(call) as behind:
        with pytest.raises(Failed, match="ended with ProviderError: upstream 401: "):
            await play(guess, behind.policy, row())
    assert len(call.calls) == 1, "it asked again in vain: the worker has the fault"


async def test_a_conversation_takes_place_in_the_host_and_leaves_nothing_there(guess):
    (process,) = psutil.Process(guess._hosts._running[0]._process.pid).children()
    files = []
    for _ in range(3):
        call = Answers()
        call.hold = asyncio.Event()
        async with behind_a_gateway(call) as behind:
            running = asyncio.create_task(play(guess, behind.policy, row()))
            await until(lambda call=call: call.calls)
            assert not process.children()
            call.hold.set()
            await running
        files.append(process.num_fds())
    assert files[0] == files[-1], "its server and its connections are gone"


async def test_a_row_of_something_else_is_named(guess):
    async with behind_a_gateway() as behind:
        for other, match in [
            ({"prompt": "q"}, "got a row without its task; have rows written by prepare"),
            ({"prompt": "q", "task": "{"}, "got a row whose task is none of guess-taskset"),
        ]:
            with pytest.raises(Failed, match=match):
                await play(guess, behind.policy, other)


@pytest.mark.parametrize("shared", [False, True], ids=["of each rollout", "of all"])
async def test_tools_are_called_in_one_branch_and_nothing_is_left(home, shared):
    ports = set(Path("/tmp").glob("vf-port-*"))
    taskset = {"shared_tools": True} if shared else {"task": {"tools": True}}
    before = came_up(home)
    async with host(args={"taskset": taskset}) as subject:
        for _ in range(2):
            async with behind_a_gateway() as behind:
                behind.policy._reader = calling("look", 2)
                played = await play(subject, behind.policy, row(turns=1))
                assert behind.session.ways == {"first": 1, "extended": 2}
                assert len(behind.session.branches) == 1
            assert (played.reward, played.metrics["looked"]) == (5.25, 2.0)
        assert bool(of("guess_taskset")) == shared, "tools of all rollouts live as long as their host"
    assert came_up(home) == before + 1
    await until(lambda: not of("guess_taskset"))
    assert not list((home / ".cache/verifiers/runtimes/subprocess").iterdir())
    assert set(Path("/tmp").glob("vf-port-*")) == ports


async def test_a_shell_of_the_policys_runs_where_one_asks_for_it(home):
    agent = {"harness": {"id": "bash", "compaction": None}, "runtime": {"type": "subprocess"}}
    async with host(environment="plain-taskset", args={"agent": agent}) as subject, behind_a_gateway() as behind:
        behind.policy._reader = calling("bash", 1, command="pwd > ~/where")
        played = await play(subject, behind.policy, row())
        assert behind.session.ways == {"first": 1, "extended": 1}
    where = Path((home / "where").read_text().strip())
    assert where.parent == home / ".cache/verifiers/runtimes/subprocess", "each rollout has a folder of its own"
    assert (played.reward, played.metrics["num_turns"]) == (3.25, 2.0)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"id": "best-of-n", "n": 2}, r"had the policy play 2 times in one episode \(agent\), and a rollout has one"),
        ({"id": "user-sim"}, r"has the policy play user, which is not to be trained; give it a model of its own with"),
    ],
)
async def test_an_episode_in_which_the_policy_plays_more_than_once_is_refused(home, args, match):
    async with host(args=args) as subject, behind_a_gateway() as behind:
        with pytest.raises(Failed, match=match):
            await play(subject, behind.policy, row(turns=1))


async def test_another_agent_with_a_model_of_its_own_is_left_out(home):
    async with behind_a_gateway() as other, behind_a_gateway() as behind:
        user = {"model": "other", "max_turns": 2}
        user["client"] = {"type": "eval", "base_url": other.policy.base_url, "api_key_var": "NO"}
        async with host(args={"id": "user-sim", "user": user}) as subject:
            played = await play(subject, behind.policy, row())
        assert played.metrics["user_turns"] == 2.0
        assert len(other.session.ended_turns[0]) == 2
        assert len(behind.session.branches) == 1


async def test_a_run_has_the_tasks_that_are_selected_written_as_rows(home, tmp_path):
    select = {"train": {"skip": 1}, "eval": {"include": {"idx": ["0:1"]}}}
    files = {split: tmp_path / f"{split}.jsonl" for split in select}
    data = {split: str(path) for split, path in files.items()}
    tree = {"model": {"path": "m"}, "data": data, "rollout": {"agent": V1.agent(select=select)}}
    await asyncio.to_thread(prepare, validate(tree))
    rows = {split: map(json.loads, path.read_text().splitlines()) for split, path in files.items()}
    prompts = {split: [row["prompt"][1]["content"] for row in found] for split, found in rows.items()}
    assert prompts == {"train": ["q1", "q2"], "eval": ["q0"]}


LOADED = """
import json, sys
from async_rl.rollout.environments.verifiers import Verifiers

for arguments, split in json.load(sys.stdin):
    try:
        Verifiers.prepare(**arguments)
        print(len(list(Verifiers.rows(split, **arguments))))
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
"""

AGENT = {"environment": "guess-taskset"}


def of_agent(**agent):
    return {**AGENT, "args": {"agent": agent}}


REFUSED = [
    (AGENT, "eval", "Failed: guess-taskset has one set of tasks; say which of them are for eval in"),
    ({**AGENT, "args": {"taskset": {"endless": True}}}, "train", "Failed: guess-taskset has tasks without end; set"),
    ({**AGENT, "args": {"taskset": {"endless": True}}, "select": {"train": {"limit": 2}}}, "train", "2"),
    ({**AGENT, "select": {"test": {}}}, "train", "Failed: has rollout.agent.arguments.select.test; there are train"),
    ({"environment": "no-such"}, "train", "ModuleNotFoundError: taskset 'no-such' not found"),
    ({"environment": "guess_taskset:no_environment"}, "train", "Failed: guess_taskset:no_environment returned a int"),
    (of_agent(harness={"id": "bash"}), "train", "Failed: guess-taskset has the harness bash, which runs what the"),
    (of_agent(runtime={"type": "prime"}), "train", "Failed: guess-taskset has prime for rollout.agent.arguments.args."),
    (of_agent(retries={"max_retries": 1}), "train", "Failed: guess-taskset makes rollouts that fail once more, and"),
    (of_agent(harnes={}), "train", "ValidationError: "),
    (
        {**AGENT, "args": {"taskset": {"task": {"tools": True, "tools_at": {"type": "modal"}}}}},
        "train",
        "Failed: guess-taskset has modal for the runtime of its tools Look",
    ),
]


async def test_what_cannot_be_trained_on_is_named_when_it_is_loaded(home):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{LIBRARIES}"}
    asked = json.dumps([[arguments, split] for arguments, split, _ in REFUSED])
    found = subprocess.run(
        [V1.python, "-c", LOADED], env=environment, input=asked, capture_output=True, text=True, check=True
    )
    for said, (*_, expected) in zip(found.stdout.splitlines(), REFUSED, strict=True):
        assert re.match(re.escape(expected), said)


async def test_doctor_loads_it(home):
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    for agent, refused in ((V1.agent(), False), (V1.agent(args={"agent": {"harness": {"id": "bash"}}}), True)):
        config = validate({**tree, "rollout": {"agent": agent}})
        with pytest.raises(AgentFailure, match="has the harness bash") if refused else contextlib.nullcontext():
            await asyncio.to_thread(probe, config, "rollout.agent")
