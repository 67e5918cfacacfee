"""Blocking functions in worker processes: whatever one does costs its own call only, and nothing is left behind.

Processes take a second to start, so most tests share a runner whose reward does what the response says.
"""

import asyncio
import glob
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import loky.backend
import numpy as np
import pytest

from async_rl.config.inputs import RewardSection
from async_rl.errors import RewardError, RewardNotApplicable
from async_rl.rollout import user_call, user_processes
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse
from async_rl.types import Prompt
from tests.support.processes import over
from tests.support.user_workers import wait_for_no_workers, workers

pytestmark = pytest.mark.asyncio(loop_scope="module")

REWARD = """
import asyncio, ctypes, math, os, pathlib, signal, sys, threading, time

class Unusual(BaseException):
    pass

def reward(prompt, response):
    names = dict(globals(), prompt=prompt)
    exec(response, names)
    return names.get("value")
"""

PROMPT = Prompt("0-17", 17, "hdbca>", np.array([1], np.int32))  # with the read-only view of no fields


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "reward_by_process.py").write_text(REWARD)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("reward_by_process", None)


def made(**settings) -> RewardRunner:
    settings = {"slow": True, "timeout_s": 600.0, "retries": 0} | settings
    return RewardRunner(RewardSection(function="reward_by_process:reward", **settings))


@pytest.fixture(scope="module")
def shared(folder):
    runner = made(workers=4)
    yield runner
    runner.close()
    wait_for_no_workers()


@pytest.fixture
def runner(shared):
    yield shared
    shared._rewards[0]._call._processes._timeout_s = 600.0


async def score(runner: RewardRunner, response: str) -> float:
    return (await runner.score(PROMPT, FinishedResponse(response))).reward


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("raise KeyError('level')", "raised KeyError: 'level'"),
        ("raise OSError('x' * 10**7)", f"raised OSError: {'x' * 2000}"),
        ("sys.exit(3)", "raised SystemExit: 3"),
        ("raise StopIteration", "raised StopIteration"),
        ("raise asyncio.CancelledError", "raised CancelledError"),
        ("raise Unusual('as of func_timeout')", "raised Unusual: as of func_timeout"),
        ("os._exit(3)", "ended its process: EXIT(3)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended its process: SIGKILL(-9)"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "ended its process: SIGTERM(-15)"),
        ("os.closerange(3, 1000)", "ended its process: "),
        ("value = {'points': 1.0}", "returned a mapping with neither 'score' nor 'reward'"),
        ("value = threading.Lock()", "of type lock; expected"),
        ("value = 'x' * 10**7", f"returned '{'x' * 199} of type str; expected"),
        ("value = math.nan", "returned nan; expected"),
        ("async def wrong(): raise KeyError('level')\nvalue = wrong()", "raised KeyError: 'level'"),
    ],
)
async def test_a_failure_is_one_error_that_names_function_row_and_what_it_did(runner, response, message):
    with pytest.raises(RewardError) as error:
        await score(runner, response)
    assert str(error.value).startswith("reward.function reward_by_process:reward, prompt 0-17 (dataset row 17): ")
    assert message in str(error.value)
    assert len(str(error.value)) < 2200
    assert await score(runner, "value = 0.5") == 0.5, "the next call has a process"


async def test_where_it_raised_is_printed_with_the_error(runner):
    with pytest.raises(RewardError) as error:
        await score(runner, "def inner(): return {}['x']\ninner()")
    assert "in inner" in str(error.value.__cause__)


async def test_none_says_that_the_reward_does_not_apply(runner):
    with pytest.raises(RewardNotApplicable, match=r"0-17 .dataset row 17.: returned None"):
        await score(runner, "value = None")


@pytest.mark.parametrize(
    "response",
    [
        "import numpy; value = numpy.float32(0.5)",
        "import torch; value = torch.tensor(0.5, dtype=torch.bfloat16)",
        "async def later(): await asyncio.sleep(0); return 0.5\nvalue = later()",
        "value = 0.5 if threading.current_thread() is threading.main_thread() else 0.0",
        "print('noise', flush=True); os.write(1, b'noise\\n'); value = 0.5",
        "value = 0.5 if dict(prompt.fields) == {} and prompt.row == 17 else 0.0",
    ],
)
async def test_it_is_called_as_in_any_process(runner, response):
    assert await score(runner, response) == 0.5


async def test_signals_work_and_an_alarm_left_over_ends_nothing(runner):
    """As math-verify limits its own time; signals need a main thread."""
    alarm = (
        "def late(*_): raise TimeoutError('late')\n"
        "signal.signal(signal.SIGALRM, late); signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "try: time.sleep(600)\n"
        "except TimeoutError: value = os.getpid()\n"
    )
    assert await score(runner, alarm) > 0
    pid = await score(runner, "signal.alarm(600); value = os.getpid()")
    assert (
        await score(runner, "value = os.getpid() if signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) else 0") == pid
    )


async def test_a_fork_answers_once_and_ends(runner):
    """What the function has forked returns from it too, and must not become a second worker."""
    forked = int(await score(runner, "value = os.fork()"))
    assert forked > 0
    await until(lambda: over(forked))
    assert await score(runner, "value = 0.5") == 0.5


@pytest.mark.parametrize(
    "how", ["while True: pass", "signal.pthread_sigmask(0, range(1, 65)); ctypes.CDLL(None).pause()"]
)
async def test_a_hang_is_killed_at_its_time_limit_with_what_it_forked(runner, how, tmp_path):
    path = str(tmp_path / "pids")
    runner._rewards[0]._call._processes._timeout_s = 1.0
    before = runner.killed
    with pytest.raises(RewardError, match=r"did not return within reward\.timeout_s"):
        await score(
            runner, f"pid = os.fork()\nif pid: pathlib.Path({path!r}).write_text(f'{{pid}} {{os.getpid()}}')\n{how}"
        )
    pids = [int(pid) for pid in Path(path).read_text().split()]
    await until(lambda: all(map(over, pids)))
    runner._rewards[0]._call._processes._timeout_s = 600.0
    assert await score(runner, "value = 0.5") == 0.5
    assert runner.killed == before + 1


async def test_a_process_ends_itself_if_nothing_else_ends_its_call(runner):
    """As when the replica is leaving, and waits for its processes."""
    processes = runner._rewards[0]._call._processes
    executor = await processes._ready()
    limit = 0.5 - user_call.KILL_MARGIN_S
    plain = replace(PROMPT, fields={})
    with pytest.raises(BrokenProcessPool):
        await user_processes._submit(
            executor, user_call.run, processes._spec, plain, FinishedResponse("while True: pass"), limit
        )
    processes._kill(executor)


async def test_the_event_loop_runs_and_others_are_served_while_rewards_compute(runner, tmp_path):
    """Three compute until the test says so, in processor time of their own."""
    here, end = time.process_time(), tmp_path / "end"
    busy = f"while not os.path.exists({str(end)!r}) or time.process_time() < 0.7: pass\nvalue = time.process_time()"
    calls = [asyncio.create_task(score(runner, busy)) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0.001)
        assert await score(runner, "value = 0.5") == 0.5
    assert not any(call.done() for call in calls)
    end.touch()
    there = sum(await asyncio.gather(*calls))
    assert time.process_time() - here < 0.5 * there


async def test_the_death_of_one_process_is_not_felt_by_another(runner, tmp_path):
    end = tmp_path / "end"
    call = asyncio.create_task(score(runner, f"while not os.path.exists({str(end)!r}): time.sleep(0.01)\nvalue = 0.5"))
    with pytest.raises(RewardError):
        await score(runner, "os._exit(3)")
    end.touch()
    assert await call == 0.5


async def test_a_process_that_dies_while_idle_is_replaced(runner):
    pid = int(await score(runner, "value = os.getpid()"))
    os.kill(pid, signal.SIGKILL)
    assert await score(runner, "value = os.getpid()") != pid


async def test_a_cancelled_call_ends_its_work_and_frees_its_place(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(user_processes, "GRACE_S", 0.1)
    runner, path = made(workers=1), tmp_path / "pid"
    try:
        hangs = f"pathlib.Path({str(path)!r}).write_text(str(os.getpid())); time.sleep(600)"
        call = asyncio.create_task(score(runner, hangs))
        others = [asyncio.create_task(score(runner, "value = os.getpid()")) for _ in range(3)]
        await until(lambda: path.exists() and path.read_text())
        others.pop().cancel()
        call.cancel()
        first, second = await asyncio.gather(*others)
        assert first == second != int(path.read_text())
    finally:
        runner.close()


async def test_as_many_processes_are_started_as_calls_need_and_no_more_than_workers(folder, tmp_path):
    runner = made(workers=2)
    try:
        assert len({await score(runner, "value = os.getpid()") for _ in range(5)}) == 1
        wait = (
            f"folder = pathlib.Path({str(tmp_path)!r}); (folder / str(os.getpid())).touch()\n"
            "while len(list(folder.iterdir())) < 2: time.sleep(0.01)\n"
            "value = os.getpid()"
        )
        assert len(set(await asyncio.gather(*(score(runner, wait) for _ in range(6))))) == 2
    finally:
        runner.close()


async def test_a_function_that_only_this_process_can_import_says_so(folder):
    (folder / "only_here.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise ImportError('not there')\ndef reward(p, r): return 1.0\n"
    )
    runner = RewardRunner(RewardSection(function="only_here:reward", slow=True, workers=2, retries=0))
    try:
        for failure in await asyncio.gather(*(score(runner, "a") for _ in range(2)), return_exceptions=True):
            assert isinstance(failure, RewardError)
            assert "a worker process cannot import it: " in str(failure)
            assert "raised ImportError: not there" in str(failure)
    finally:
        runner.close()


async def test_close_ends_all_processes_and_calls(folder, tmp_path):
    runner, begun = made(workers=1), tmp_path / "begun"
    calls = [
        asyncio.create_task(score(runner, f"pathlib.Path({str(begun)!r}).touch(); time.sleep(600)")),
        asyncio.create_task(score(runner, "value = 0.5")),
    ]
    await until(begun.exists)
    before = len(workers())
    runner.close()
    for failure in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(failure, RewardError)
        assert "shutting down" in str(failure)
    await until(lambda: len(workers()) < before)


async def test_semaphores_are_named_as_those_that_the_end_of_a_run_removes(runner, monkeypatch):
    """A kill of the run leaves them in shared memory; see runtime.process. Without the patch, loky names them all."""
    assert await score(runner, "value = 0.5") == 0.5
    assert glob.glob(f"/dev/shm/sem.loky-{os.getpid()}-*") == []
    monkeypatch.setitem(multiprocessing.current_process()._config, "semprefix", "/of-a-run")
    for context in (multiprocessing.get_context("spawn"), loky.backend.get_context()):
        assert context.Lock()._semlock.name.startswith("/of-a-run-")


RUN = """
import asyncio, os, sys
import numpy as np
from async_rl.config.inputs import RewardSection
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse
from async_rl.types import Prompt

async def main():
    runner = RewardRunner(RewardSection(function="reward_by_process:reward", slow=True, timeout_s=float(sys.argv[2])))
    prompt = Prompt("0-1", 1, "a", np.array([1], np.int32))
    here = f"pathlib.Path({sys.argv[1]!r}, str(os.getpid())).touch(); "
    hangs = asyncio.create_task(runner.score(prompt, FinishedResponse(here + "time.sleep(600)")))
    while not os.listdir(sys.argv[1]):
        await asyncio.sleep(0.01)
    await runner.score(prompt, FinishedResponse(here + "value = 1"))
    print("begun", flush=True)
    if sys.argv[3] == "stay":
        await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("ending", ["stay", "leave"])
async def test_processes_end_with_the_one_that_started_them(folder, tmp_path, ending):
    """Killed, it can do nothing about them. Leaving without ``close``, it does not wait for a call that hangs."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    arguments = [sys.executable, "-c", RUN, str(tmp_path), "600", ending]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout.readline() == "begun\n"
            pids = [int(path.name) for path in tmp_path.iterdir()]
            if ending == "leave":
                assert parent.wait(60) == 0
        finally:
            parent.kill()
    assert len(pids) == 2
    try:
        await until(lambda: all(map(over, pids)))
    finally:
        for pid in itertools.filterfalse(over, pids):
            os.kill(pid, signal.SIGKILL)
