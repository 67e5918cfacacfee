"""Rewards: what the two that come with the package return, how one is found, and what a failing one does."""

import asyncio
import importlib
import threading
import time

import numpy as np
import pytest
from asyncio_throttle.throttler import Throttler

from async_rl.config.inputs import RewardSection
from async_rl.errors import RewardError, RewardNotApplicable
from async_rl.rollout.rewards.loader import load_reward
from async_rl.rollout.rewards.named import NamedReward
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse
from async_rl.rollout.rewards.text import exact_match, partial_credit
from async_rl.types import Prompt


def prompt(**fields) -> Prompt:
    return Prompt("0-17", 17, "hdbca>", np.array([1], np.int32), fields)


async def score(runner: RewardRunner, response: str = "a") -> float:
    return (await runner.score(prompt(), FinishedResponse(response))).reward


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """Write a module of rewards and return a function that makes a runner for one of them."""

    made = []

    def make(source: str, **settings) -> RewardRunner:
        (tmp_path / "my_rewards.py").write_text("import asyncio, math, threading, time\n" + source)
        made.append(RewardRunner(RewardSection(function="my_rewards:reward", **{"retries": 0} | settings)))
        return made[-1]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "my_rewards", raising=False)
    importlib.invalidate_caches()
    yield make
    for runner in made:
        runner.close()
    importlib.sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(
    ("response", "exact", "partial"),
    [
        ("abcdh", 1.0, 1.0),
        (" abcdh\n", 1.0, 1.0),
        ("abcd", 0.0, 0.8),
        ("abcdhh", 0.0, 5 / 6),
        ("bacdh", 0.0, 0.6),
        ("", 0.0, 0.0),
        ("zzzzzzzzzz", 0.0, 0.0),
    ],
)
def test_exact_match_and_partial_credit(response, exact, partial):
    assert exact_match(prompt(answer="abcdh"), response) == exact
    assert partial_credit(prompt(answer="abcdh"), response) == pytest.approx(partial)


def test_partial_credit_of_an_empty_answer():
    assert partial_credit(prompt(answer=""), "") == 1.0
    assert partial_credit(prompt(answer=""), "a") == 0.0


@pytest.mark.parametrize("fields", [{"solution": "a"}, {"answer": 5}])
def test_a_row_without_an_answer_is_named(fields):
    with pytest.raises(RewardError, match=r"needs a string field 'answer' .* row 17 has"):
        exact_match(prompt(**fields), "a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "there is no module 'no_such_module'.*PYTHONPATH"),
        ("async_rl.rollout.rewards.text:exactmatch", "has no function 'exactmatch'; it has .*exact_match"),
        ("async_rl.rollout.rewards.text", "not of the form module:function"),
        ("async_rl.rollout.rewards.code:limit_sandboxes", "cannot be called as f.prompt, response."),
    ],
)
def test_a_reward_that_cannot_be_loaded_says_why(name, message):
    with pytest.raises(RewardError, match=rf"reward\.function: {name!r}.*{message}|reward\.function: .*{message}"):
        load_reward(NamedReward("reward.function", name))


def test_a_module_that_fails_to_import_says_why(rewards):
    with pytest.raises(RewardError, match="importing 'my_rewards' raised ZeroDivisionError"):
        rewards("1 / 0\n")


@pytest.mark.parametrize(
    "value",
    [
        "1",
        "True",
        "0.5",
        "fractions.Fraction(1, 2)",
        "numpy.float32(0.5)",
        "numpy.longdouble(0.5)",
        "numpy.uint8(1)",
        "numpy.bool_(True)",
        "numpy.array(0.5)",
        "numpy.array(True)",
        "torch.tensor(0.5)",
        "torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)",
        "torch.ones(3).mean()",
        "torch.tensor(True)",
    ],
)
async def test_any_real_number_is_a_reward(rewards, value):
    source = "import fractions, numpy, torch\ndef reward(prompt, response): return "
    reward = await score(rewards(source + value))
    assert type(reward) is float
    assert reward in (0.5, 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "1 + 0j",
            "returned (1+0j) of type complex; expected one finite real number, or None where the reward does not",
        ),
        ("numpy.complex64(1)", "of type complex64; expected"),
        ("torch.tensor(1 + 0j)", "returned tensor(1.+0.j) of type Tensor; expected"),
        ("[1.0]", "returned [1.0] of type list; expected"),
        ("numpy.array([1.0])", "returned array([1.]) of type ndarray; expected"),
        ("torch.ones(1)", "returned tensor([1.]) of type Tensor; expected"),
        ("numpy.array('1')", "of type ndarray; expected"),
        ("numpy.array(None)", "of type ndarray; expected"),
        ("torch.tensor(1.0, device='meta')", "of type Tensor; expected"),
        ("numpy.float32('inf')", "returned np.float32(inf); expected"),
        ("torch.tensor(float('nan'))", "returned tensor(nan); expected"),
        ("10**400", f"returned 1{199 * '0'}; expected"),
    ],
)
async def test_what_is_no_real_number_is_refused_by_name(rewards, value, message):
    runner = rewards(f"import numpy, torch\ndef reward(prompt, response): return {value}\n")
    with pytest.raises(RewardError) as error:
        await score(runner, "a")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('level')", "raised KeyError: 'level'"),
        ("return math.nan", "returned nan; expected one finite real number"),
        ("return -math.inf", "returned -inf"),
        ("return '1'", "returned '1' of type str"),
    ],
)
@pytest.mark.parametrize("define", ["def", "async def"])
async def test_a_failing_reward_names_function_row_and_value(rewards, body, message, define):
    runner = rewards(f"{define} reward(prompt, response): {body}\n")
    with pytest.raises(RewardError) as error:
        await score(runner, "a")
    assert str(error.value).startswith("reward.function my_rewards:reward, prompt 0-17 (dataset row 17): ")
    assert message in str(error.value)


@pytest.mark.parametrize("define", ["def", "async def"])
async def test_none_says_that_the_reward_does_not_apply(rewards, define):
    runner = rewards(f"{define} reward(prompt, response): return None\n")
    with pytest.raises(RewardNotApplicable, match=r"my_rewards:reward, prompt 0-17 .dataset row 17.: returned None"):
        await score(runner, "a")


@pytest.mark.parametrize("define", ["def", "async def"])
@pytest.mark.parametrize(
    "raised",
    [
        "asyncio.CancelledError",
        "StopIteration",
        "SystemExit",
        "KeyboardInterrupt",
        "GeneratorExit",
        "TimeoutError",
        "Unusual",  # FunctionTimedOut of the package func_timeout is such a one
    ],
)
async def test_whatever_a_reward_raises_is_reported_at_once_and_leaves_room_for_other_calls(rewards, define, raised):
    source = f"class Unusual(BaseException): pass\n{define} reward(prompt, response): raise {raised}\n"
    runner = rewards(source, timeout_s=600)
    name = raised.removeprefix("asyncio.")
    if define == "async def" and name == "StopIteration":
        name = "RuntimeError: coroutine raised StopIteration"  # Python's own doing
    for _ in range(5):
        with pytest.raises(RewardError, match=rf"my_rewards:reward, prompt 0-17 .dataset row 17.: raised {name}$"):
            await score(runner, "a")


@pytest.mark.parametrize(
    "define",
    [
        "class Judge:\n    async def __call__(self, prompt, response): {}\nreward = Judge()\n",
        "async def judge(prompt, response): {}\ndef reward(prompt, response): return judge(prompt, response)\n",
    ],
)
async def test_what_a_reward_returns_is_awaited_on_another_event_loop_whatever_the_reward_is(rewards, define):
    runner = rewards(define.format("await asyncio.sleep(0); return threading.get_ident()"))
    assert await score(runner, "a") != threading.get_ident()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_future_of_this_event_loop_is_awaited_here(rewards, cancelled):
    runner = rewards("def reward(p, r): return asyncio.ensure_future(asyncio.sleep(float(r), 0.5))\n", timeout_s=0.05)
    assert await score(runner, "0") == 0.5
    with pytest.raises(RewardError, match=r"did not return within reward\.timeout_s = 0\.05 s"):
        await score(runner, "600")


async def test_an_awaitable_that_hangs_times_out(rewards):
    runner = rewards("def reward(p, r): return asyncio.sleep(600)\n", timeout_s=0.05)
    with pytest.raises(RewardError, match=r"did not return within reward\.timeout_s = 0\.05 s"):
        await score(runner, "a")


async def test_an_async_reward_that_cancels_its_own_task_fails(rewards):
    runner = rewards("async def reward(p, r):\n asyncio.current_task().cancel()\n await asyncio.sleep(600)\n")
    with pytest.raises(RewardError, match="raised CancelledError"):
        await score(runner, "a")


async def test_a_fast_reward_runs_on_the_loop_thread(rewards):
    runner = rewards("def reward(prompt, response): return threading.get_ident()\n")
    assert await score(runner, "a") == float(threading.get_ident())


async def test_an_async_reward_that_ignores_its_cancellation_is_left_behind(rewards, monkeypatch):
    monkeypatch.setattr("async_rl.rollout.user_loop.CLEAN_UP_S", 0.01)
    source = (
        "ended = threading.Event()\n"
        "async def reward(prompt, response):\n"
        "    while not ended.is_set():\n"
        "        try: await asyncio.sleep(0.01)\n"
        "        except asyncio.CancelledError: pass\n"
    )
    runner = rewards(source, timeout_s=0.01)
    with pytest.raises(RewardError, match="did not return within"):
        await score(runner, "a")
    assert runner._rewards[0]._call._loop.abandoned == 0, "its event loop still turns"
    importlib.import_module("my_rewards").ended.set()


@pytest.mark.parametrize(("define", "slow"), [("def", False), ("def", True), ("async def", False)])
async def test_rewards_of_every_kind_are_rate_limited(rewards, define, slow):
    """Five calls at two per period take two full periods at least."""
    runner = rewards(f"{define} reward(prompt, response): return 1.0\n", slow=slow, rate_limit=2, rate_period_s=0.1)
    started = time.monotonic()
    assert await asyncio.gather(*[score(runner, "a") for _ in range(5)]) == [1.0] * 5
    assert time.monotonic() - started >= 0.2


async def test_one_call_at_a_time_polls_the_rate_limit(rewards, monkeypatch):
    """However many wait, in the order of their calls, and past one that is cancelled."""
    flush, polls = Throttler.flush, []
    monkeypatch.setattr(Throttler, "flush", lambda throttler: (polls.append(1), flush(throttler))[1])
    source = "calls = []\ndef reward(prompt, response): calls.append(response); return 1.0\n"
    runner = rewards(source, rate_limit=1, rate_period_s=600)
    runner._rewards[0]._call._throttler.retry_interval = 600  # The one that stands there polls once.
    waiting = [asyncio.create_task(score(runner, str(n))) for n in range(100)]
    await waiting[0]
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(polls) == 2, "one has passed, one stands at the throttler"
    waiting[1].cancel()
    runner._rewards[0]._call._throttler.rate_limit = 100
    await asyncio.wait(waiting)
    assert importlib.import_module("my_rewards").calls == ["0", *(str(n) for n in range(2, 100))]


async def test_cancelling_a_score_is_not_a_reward_error(rewards):
    runner = rewards("async def reward(prompt, response): await asyncio.sleep(30)\n")
    scoring = asyncio.create_task(score(runner, "a"))
    await asyncio.sleep(0.01)
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring


async def test_cancelling_a_score_waits_until_the_function_has_cleaned_up(rewards):
    source = (
        "steps = []\n"
        "async def reward(prompt, response):\n"
        "    steps.append('begun')\n"
        "    try: await asyncio.sleep(600)\n"
        "    finally:\n"
        "        await asyncio.sleep(0)\n"
        "        steps.append('cleaned up')\n"
    )
    runner = rewards(source, timeout_s=600)
    scoring = asyncio.create_task(score(runner, "a"))
    while not importlib.import_module("my_rewards").steps:
        await asyncio.sleep(0.001)
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring
    assert importlib.import_module("my_rewards").steps == ["begun", "cleaned up"]


async def test_a_closed_runner_takes_no_calls(rewards):
    runner = rewards("def reward(prompt, response): return 1.0\n")
    runner.close()
    with pytest.raises(RewardError, match="shutting down"):
        await score(runner, "a")


FAILS_TWICE = """
calls = []
{} reward(prompt, response):
    calls.append(response)
    if len(calls) < 3:
        {}
    return 1.0
"""


@pytest.mark.parametrize(
    ("define", "failure", "calls"),
    [
        ("async def", "raise OSError('busy')", 3),
        ("async def", "await asyncio.sleep(600)", 3),
        ("def", "return asyncio.sleep(600)", 3),
        ("async def", "return math.nan", 1),
        ("async def", "raise SystemExit", 1),
        ("def", "raise OSError('busy')", 1),
    ],
)
async def test_a_reward_that_waits_for_something_is_tried_again_and_no_other(
    rewards, monkeypatch, define, failure, calls
):
    monkeypatch.setattr("async_rl.rollout.user_function._BACK_OFF_S", 0.001)
    runner = rewards(FAILS_TWICE.format(define, failure), retries=2, timeout_s=0.1)
    if calls == 3:
        assert await score(runner, "a") == 1.0
    else:
        with pytest.raises(RewardError):
            await score(runner, "a")
    assert len(importlib.import_module("my_rewards").calls) == calls
    assert runner.retries == calls - 1
    assert runner.killed == 0


async def test_attempts_end_and_are_farther_and_farther_apart(rewards, monkeypatch):
    waits, sleep = [], asyncio.sleep
    monkeypatch.setattr("async_rl.rollout.user_function.asyncio.sleep", lambda s: (waits.append(s), sleep(0))[1])
    runner = rewards("async def reward(prompt, response): raise OSError('busy')\n", retries=3)
    with pytest.raises(RewardError, match=r"raised OSError: busy, at 4 attempts$"):
        await score(runner, "a")
    assert waits == [0.5, 1.0, 2.0]
    assert runner.retries == 3
