"""Weight syncs beside the training loop: a scripted trainer computes while scripted engines load and check weights.

The loop, ``Pusher`` and ``WeightSync`` are the real ones; without Ray.
"""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from async_rl.config.inputs import EvalSection
from async_rl.driver.evaluation import Evaluator
from async_rl.driver.leases import LeasedGroups
from async_rl.driver.loop import TrainingLoop
from async_rl.driver.push import Pusher
from async_rl.errors import TrainerDied, WeightSyncMismatch
from tests.support.scripted_sync import Engine, Slow, Trainer, settled, sync


class Parts(Trainer):
    """The trainer, and everything else that the loop calls; ``events`` has what happened in which order."""

    def __init__(self, events, sends=False):
        super().__init__(Engine(), sends)
        self.events, self.calls = events, events
        self.updates, self.staged_of = 0, []  # optimizer updates; the weights of each staging, by their number
        self.groups, self.members, self.dies_at = asyncio.Event(), {}, None
        self.groups.set()
        self.checkpoint_at, self.latest_step = None, 0
        self.samples = SimpleNamespace(before_ack=self.nothing, finished=self.nothing, begin=self.write_samples)

    async def nothing(self, *_, **__):
        return None

    # trainer
    async def stage_weights(self):
        self.staged_of.append(self.updates)
        return await super().stage_weights()

    async def accumulate(self, shares, version, oldest, *, first):
        self.events.append(f"accumulate at {version}")
        if self.dies_at == version:
            self.dies_at = None
            raise TrainerDied("the trainer died")

    async def finish_step(self):
        self.events.append("update")
        self.updates += 1

    async def train_step(self, *_):
        await self.finish_step()
        return []

    async def fetch(self, shares):
        return []

    # queue
    async def lease(self, consumer, n, *, timeout_s, at_least):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await self.groups.wait()
        if not self.groups.is_set():
            return []
        return [(SimpleNamespace(group_id=f"g{i}"), None) for i in range(at_least)]

    async def ack(self, group_ids, step):
        self.events.append(f"ack {step}")

    async def release(self, group_ids):
        self.events.append(f"release {len(group_ids)}")

    async def advance(self, version):
        self.events.append(f"window {version}")

    # replicas
    async def admit(self, version):
        self.events.append(f"admit at {version}")

    async def add_waiting_members(self): ...

    def evict(self, error):
        self.events.append(f"evict {error.replica}")
        del self.sync.members[error.replica]

    def on_sync_done(self): ...

    # trainer recovery
    async def give_back(self, group_ids, error):
        await self.release(group_ids)

    # checkpointer
    def due(self, step):
        return step == self.checkpoint_at

    async def freeze(self, step, replica):
        self.events.append(f"freeze {replica}")

    async def take(self, step, version, *, synced):
        self.events.append("take")
        return SimpleNamespace(step=step, version=version)

    async def write(self, state):
        self.events.append(f"write {state.version}")

    async def finish(self): ...

    # recorder and monitor
    def described(self, leased):
        return []

    def record_step(self, step, version, *_, step_s):
        self.events.append(f"record {step} at {version}")

    def synced(self, record):
        self.events.append(f"synced {record.policy_version}")

    async def write_samples(self, step, version, leased):
        self.events.append(f"samples {step}")

    @contextlib.contextmanager
    def phase(self, name, step):
        yield

    async def poll(self): ...

    def event(self, *_, **__): ...


def training(steps=2, streaming=True, sends=False, dtype="float32", slow="score", **sections):
    """A loop of ``steps`` with two replicas, of which the second is late with its call ``slow``."""
    events = []
    parts = Parts(events, sends)
    subject, _ = sync(
        Engine(),
        model={"path": "m", "dtype": dtype},
        trainer={"steps": steps, "groups_per_step": 2, "streaming": streaming},
        **sections,
    )
    subject._attempts._trainer = subject.canary._trainer = parts
    engines = [Engine(), Slow(slow)]
    for replica, engine in enumerate(engines):
        engine.calls = Named(events, replica)
    subject.members = dict(enumerate(engines))
    parts.sync = subject
    loop = TrainingLoop.__new__(TrainingLoop)
    loop._config, loop._sync, loop._step, loop._stopping = subject._config, subject, 0, False
    loop._trainers = loop._queue = loop._replicas = loop._checkpointer = loop._monitor = parts
    loop._recorder = SimpleNamespace(
        described=parts.described, record_step=parts.record_step, sync=parts.synced, samples=parts.samples,
        event=parts.event,
    )  # fmt: skip
    loop._shares = lambda groups, loads=None: [groups]
    loop._groups = LeasedGroups(parts, parts, parts)
    loop._trainer_recovery = parts
    loop._evaluator = Evaluator(
        SimpleNamespace(eval=EvalSection(every=0)), [], sync=subject, replicas=parts, monitor=parts, recorder=parts
    )
    loop._pusher = Pusher(
        0, 0, queue=parts, sync=subject, replicas=parts, evaluator=loop._evaluator, checkpointer=parts, monitor=parts,
        recorder=loop._recorder,
    )  # fmt: skip
    return loop, parts, events, engines


class Named(list):
    """The calls of one engine, which go to a list of all."""

    def __init__(self, events, replica):
        super().__init__()
        self.events, self.replica = events, replica

    def append(self, call):
        super().append(call)
        self.events.append(f"{call} {self.replica}")


async def until(events, *, contains):
    """Let things happen until ``contains`` has."""
    async with asyncio.timeout(5):
        while contains not in events:
            await asyncio.sleep(0.001)
    await settled()


async def test_the_next_step_is_computed_while_the_slowest_engine_checks_its_weights():
    loop, parts, events, (_, slow) = training()
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="accumulate at 1")
    assert events.count("accumulate at 1") == 2, "both groups of the step"
    assert "resume 0" in events
    assert "score 1" not in events, "its canary has not answered"
    assert events.count("update") == 1, "the weights that were pushed stay until the sync is over"
    assert "samples 1" not in events
    # The window opens when no replica samples under the old weights any more, and before groups are leased for it.
    opened = events.index("window 1")
    assert max(events.index("pause 0"), events.index("pause 1")) < opened < events.index("accumulate at 1")
    assert not [event for event in events[opened:] if event.startswith("admit")]
    slow.may_answer.set()
    await running
    assert events.index("resume 1") < events.index("synced 1") < events.index("samples 1")
    assert [event for event in events if event in ("update", "synced 1", "synced 2")] == [
        "update", "synced 1", "update", "synced 2",
    ]  # fmt: skip
    assert events[-1] == "samples 2", "the last sync is waited for"
    assert (loop._pusher.version, loop._pusher.synced_step, parts.updates) == (2, 2, 2)
    assert [event for event in events if event.startswith("record")] == ["record 1 at 0", "record 2 at 1"]


async def test_a_replica_that_joins_within_a_step_costs_the_step_nothing():
    """What was leased stays leased, and gradients that were accumulated are not computed again."""
    loop, parts, events, (_, slow) = training(steps=1)
    slow.may_answer.set()
    firsts, accumulate = [], parts.accumulate

    async def counted(shares, version, oldest, *, first):
        firsts.append(first)
        parts.groups.clear()
        await accumulate(shares, version, oldest, first=first)

    parts.accumulate = counted
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="accumulate at 0")
    events.clear()
    await until(events, contains="admit at 0")
    parts.groups.set()
    await until(events, contains="accumulate at 0")
    await running
    assert firsts == [True, False]
    before_the_update = events[: events.index("update")]
    assert not [event for event in before_the_update if event.startswith(("release", "pause"))]


async def test_without_streaming_groups_are_leased_and_the_update_waits():
    loop, _, events, (_, slow) = training(streaming=False)
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="resume 0")
    assert events.count("update") == 1
    slow.may_answer.set()
    await running
    assert events.count("update") == 2


@pytest.mark.parametrize("why", ["sends", "bfloat16", "rolling"])
async def test_where_the_trainer_takes_part_it_waits_for_the_whole_sync(why):
    loop, _, events, (_, slow) = training(
        sends=why == "sends", dtype="bfloat16" if why == "bfloat16" else "float32", sync={"rolling": why == "rolling"}
    )
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="resume 0")
    assert "accumulate at 1" not in events
    slow.may_answer.set()
    await running
    assert events.index("resume 1") < events.index("accumulate at 1")


async def test_a_checkpoint_has_all_replicas_paused_at_once():
    loop, parts, events, (_, slow) = training()
    parts.checkpoint_at = 1
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="freeze 0")
    assert "resume 0" not in events
    slow.may_answer.set()
    await running
    order = [events.index(event) for event in ("freeze 1", "take", "window 1", "resume 0", "samples 1", "write 1")]
    assert order == sorted(order)
    assert events.index("write 1") < events.index("accumulate at 1")


async def test_a_second_attempt_sends_the_weights_of_the_first_although_the_next_step_is_under_way():
    loop, parts, events, (_, slow) = training()
    slow.wrong = 2
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="accumulate at 1")
    slow.may_answer.set()
    await running
    assert parts.staged_of == [1, 1, 2]
    assert events.count("resume 0") == 2, "the replica that agreed generates"


@pytest.mark.parametrize("waits_for", ["groups", "update"])
async def test_a_mismatch_ends_the_run_whatever_the_loop_waits_for(waits_for):
    loop, parts, events, (_, slow) = training()
    slow.wrong = 9
    if waits_for == "groups":
        slow.do_pause = lambda **_: parts.groups.clear()
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="resume 0")
    slow.may_answer.set()
    with pytest.raises(WeightSyncMismatch, match="replica 1 "):
        await asyncio.wait_for(running, 5)
    assert "resume 1" not in events
    assert parts.updates == 1


@pytest.mark.parametrize("call", ["pause", "receive", "wake", "score", "resume"])
async def test_a_replica_that_dies_in_any_phase_is_left_out_and_the_next_step_is_trained(call):
    loop, parts, events, (_, slow) = training(slow=call)
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="receive 0")
    slow.dead = call
    slow.may_answer.set()
    await running
    assert events.count("evict 1") == 1
    assert (parts.updates, events.count("window 1"), events.count("synced 1")) == (2, 1, 1)
    assert events.count("receive 0") == 2, "once for each version"


async def test_a_trainer_that_dies_beside_a_sync_is_restarted_once_the_sync_is_over():
    loop, parts, events, (_, slow) = training()

    async def restart(error):
        events.append("restart")
        return 0, []

    parts.restart = restart
    parts.dies_at = 1
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="release 1")
    assert "restart" not in events
    slow.may_answer.set()
    await running
    assert events.index("resume 1") < events.index("restart")
    # The step is undone, and its version is not used again.
    assert loop._pusher.version == 4
    assert [event for event in events if event.startswith("window")] == ["window 1", "window 2", "window 3", "window 4"]


async def test_a_run_that_ends_ends_the_sync_too():
    loop, _, events, _ = training()
    running = asyncio.ensure_future(loop._train())
    await until(events, contains="accumulate at 1")
    running.cancel()
    loop._pusher.cancel()
    await settled()
    assert loop._pusher._pushing.cancelled()
