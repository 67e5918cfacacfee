"""What the training loop does around its steps: each version is evaluated once. Without Ray, engines and a trainer."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from async_rl.config.inputs import EvalSection, Terms
from async_rl.driver.evaluation import EvalSet, Evaluator
from async_rl.driver.loop import TrainingLoop
from async_rl.driver.push import Pusher
from async_rl.errors import StalledError
from async_rl.metrics.evaluation import Answered, EvalRules
from async_rl.rollout.evaluation import EvalAnswer, EvalProblem, EvalResult


def make_loop(evaluated, *, steps, every, beside=True, found=None, version=0, evaluated_before=None):
    """A loop whose training step is a weight sync and nothing else; ``evaluated`` gets the versions."""
    loop = TrainingLoop.__new__(TrainingLoop)

    async def nothing(*_, **__):
        return None

    async def train():
        for _ in range(steps):
            await loop._pusher.push(0)

    async def on(replica, call):
        return EvalResult(loop._pusher.version, (EvalAnswer("held_out", "a", Answered((0.5,), (3,), 0)),))

    async def agree():
        return SimpleNamespace(report=SimpleNamespace(max_abs_diff=0.0), unreached_experts=0)

    async def restore(folder):
        return version

    def evaluation(results, at, step):
        recorded.append(at)
        evaluated.append(at)

    recorded = [evaluated_before]
    recorder = SimpleNamespace(
        is_evaluated=lambda name, at, step: at in recorded,
        evaluation=evaluation,
        eval_sample=lambda *_: None,
        training_begins=lambda: None,
        training_ended=lambda: None,
        sync=lambda _: None,
        samples=SimpleNamespace(finished=nothing),
        final_model="final",
        event=lambda *_, **__: None,
    )
    config = SimpleNamespace(eval=EvalSection(every=every, beside_rollouts=beside))
    loop._recorder, loop._found = recorder, found
    loop._step = version
    loop._training = loop._stopping = False
    loop._rollouts = SimpleNamespace(workers={})
    loop._replicas = SimpleNamespace(
        training=list, stop=nothing, add_waiting_members=nothing, on_sync_done=lambda: None, close=lambda: None
    )
    loop._monitor = SimpleNamespace(
        run=asyncio.Event().wait, poll=nothing, last_poll=nothing, phase=lambda *_: contextlib.nullcontext()
    )
    loop._sync = SimpleNamespace(members={0: None}, begin=agree, run=nothing, resume=nothing, on=on)
    loop._checkpointer = SimpleNamespace(watch=asyncio.Event().wait, restore=restore)
    loop._queue = SimpleNamespace(advance=nothing)
    loop._trainers = SimpleNamespace(export=nothing)
    loop._start, loop._train, loop._shut_down = nothing, train, nothing
    parts = {"sync": loop._sync, "replicas": loop._replicas, "monitor": loop._monitor, "recorder": recorder}
    problems = (EvalProblem(Terms("held_out", 40), SimpleNamespace(prompt_id="a")),)
    loop._evaluator = Evaluator(config, [EvalSet("held_out", problems, EvalRules(1, (1,), 1.0), every)], **parts)
    loop._pusher = Pusher(
        version, version, queue=loop._queue, evaluator=loop._evaluator, checkpointer=loop._checkpointer, **parts
    )
    return loop


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("steps", "every", "versions"), [(4, 2, [0, 2, 4]), (5, 2, [0, 2, 4, 5]), (3, 0, [0, 3])])
def test_each_version_is_evaluated_once(steps, every, versions, beside):
    evaluated = []
    asyncio.run(make_loop(evaluated, steps=steps, every=every, beside=beside).run())
    assert evaluated == versions


@pytest.mark.parametrize(("steps", "before", "versions"), [(6, 5, [10, 12]), (0, 6, []), (0, 5, [6])])
def test_a_restored_run_evaluates_no_version_again(steps, before, versions):
    evaluated = []
    asyncio.run(make_loop(evaluated, steps=steps, every=5, found="step", version=6, evaluated_before=before).run())
    assert evaluated == versions


@pytest.mark.parametrize("beside", [True, False])
def test_a_restored_run_evaluates_its_version_if_it_was_ended_before_the_result(beside):
    evaluated = []
    loop = make_loop(evaluated, steps=1, every=3, beside=beside, found="step", version=6, evaluated_before=3)
    asyncio.run(loop.run())
    assert evaluated == [6, 7]


async def hangs(*_):
    await asyncio.Event().wait()


@pytest.mark.parametrize("stage", ["restore", "agreement", "evaluation"])
def test_what_hangs_before_the_first_step_is_watched_like_a_step(stage):
    loop = make_loop([], steps=1, every=0, found="step" if stage == "restore" else None)
    if stage == "evaluation":
        loop._sync.on = hangs
    elif stage == "restore":
        loop._checkpointer.restore = hangs
    else:
        loop._sync.begin = hangs

    async def stalls():
        await asyncio.sleep(0.01)
        raise StalledError("nothing has moved for 1800 s")

    loop._monitor.run = stalls
    with pytest.raises(StalledError):
        asyncio.run(asyncio.wait_for(loop.run(), 5))


def test_a_run_that_is_interrupted_counts_the_groups_of_its_last_step():
    """In the middle of a second, after the monitor has looked; before the actors are shut down."""
    order, loop = [], make_loop([], steps=1, every=0)

    def noting(name):
        async def note():
            order.append(name)

        return note

    loop._train, loop._monitor.last_poll, loop._shut_down = hangs, noting("counts"), noting("shut down")

    async def interrupted():
        run = asyncio.ensure_future(loop.run())
        await asyncio.sleep(0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(interrupted())
    assert order == ["counts", "shut down"]
