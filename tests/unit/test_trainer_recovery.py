"""What follows when the trainer fails: which groups are left out, and from where it is restarted."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError

from async_rl.config.operation import CheckpointSection, WatchdogSection
from async_rl.driver import run_state
from async_rl.driver.run_state import RunState
from async_rl.driver.trainer_recovery import Suspects, TrainerRecovery
from async_rl.errors import CheckpointDamaged, StalledError, TrainerDied, TrainerError
from async_rl.runtime import manifest

NODE_DIED = "The actor died because its node has died. Node Id: 1a2b"
DIED = TrainerDied("the trainer failed in finish_step: OutOfMemoryError: no memory")


def test_groups_are_left_out_at_the_second_failure_in_a_row():
    suspects = Suspects()
    assert suspects.blame(["a", "b"]) == []
    assert suspects.blame(["b", "c"]) == ["b"]
    assert suspects.blame(["a", "c"]) == ["c"], "a was in no later failure until now"
    assert suspects.blame(["b"]) == []


class Parts:
    """Queue, trainer, checkpointer, recovery and recorder in one, which note what they are asked."""

    def __init__(self, found=None, damaged=0):
        self.found, self.damaged, self.calls = found, damaged, []
        self.samples = self

    def __getattr__(self, name):
        async def call(*args, **fields):
            self.calls.append((name, *args))
            return ["0-1.0", "0-2.0"] if name == "rewind" else None

        return call

    async def start(self, found):
        self.calls.append(("start",))
        if self.damaged:
            self.damaged -= 1
            raise CheckpointDamaged(str(found), "a file is missing")

    def pass_over(self, damaged):
        self.calls.append(("passed over", damaged.path))

    async def latest(self):
        return self.found

    def replace(self):
        self.calls.append(("replace",))

    def event(self, name, **fields):
        self.calls.append((name, fields["groups"]))


class Records(Parts):
    def rewind(self, step, state):
        self.calls.append(("records rewound", step))


FREE = "3 CPU, 0 GPU (not placed: trainer, 2 GPU on one host)"


async def free():
    return FREE


def recovery(tmp_path, found=None, damaged=0):
    parts, records = Parts(found, damaged), Records(found)
    records.calls = parts.calls
    subject = TrainerRecovery(
        SimpleNamespace(
            run_dir=tmp_path,
            checkpoint=CheckpointSection(every=5),
            watchdog=WatchdogSection(stall_s=0.01, abort_s=0.05),
        ),
        queue=parts,
        trainers=parts,
        checkpointer=parts,
        recovery=parts,
        recorder=records,
        free=free,
    )
    return subject, parts.calls


async def test_a_batch_that_fails_twice_is_given_up_and_named(tmp_path):
    subject, calls = recovery(tmp_path)
    assert await subject.set_aside(["a", "b"], DIED) == ["a", "b"]
    assert calls == []
    assert await subject.set_aside(["a", "b", "c"], DIED) == ["c"]
    assert calls == [("fail", "a", "trainer"), ("fail", "b", "trainer"), ("batch_set_aside", "a b")]


@pytest.mark.parametrize(
    "cause",
    [
        ActorDiedError(ActorDiedErrorContext(actor_id=bytes(16), error_message=NODE_DIED)),
        ActorUnavailableError("broken pipe", None),
        RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:43407: Connection reset by peer"),
    ],
)
async def test_the_loss_of_a_host_is_not_blamed_on_a_batch(tmp_path, cause):
    subject, calls = recovery(tmp_path)
    error = TrainerDied("trainer rank 1 died during finish_step")
    error.__cause__ = cause
    for _ in range(3):
        assert await subject.set_aside(["a", "b"], error) == ["a", "b"]
    error.__cause__ = ActorDiedError()
    assert await subject.set_aside(["a", "b"], error) == ["a", "b"]
    assert calls == []
    assert await subject.set_aside(["a", "b"], error) == []


async def test_the_trainer_restarts_from_the_checkpoint_and_what_it_trained_since_is_issued_again(tmp_path):
    state = RunState(step=7, version=8, synced=True, queue={}, recorder={}, queued={}, in_flight={})
    manifest.write(tmp_path, run_state.write_head(tmp_path, state))
    subject, calls = recovery(tmp_path, found=tmp_path)
    assert await subject.restart(DIED) == (7, 2)
    assert [name for name, *_ in calls] == ["wait", "replace", "start", "rewind", "finished", "records rewound"]


async def test_a_checkpoint_that_is_found_damaged_as_it_is_loaded_is_passed_over(tmp_path):
    state = RunState(step=7, version=8, synced=True, queue={}, recorder={}, queued={}, in_flight={})
    manifest.write(tmp_path, run_state.write_head(tmp_path, state))
    subject, calls = recovery(tmp_path, found=tmp_path, damaged=1)
    assert await subject.restart(DIED) == (7, 2)
    assert [name for name, *_ in calls].count("start") == 2
    assert ("passed over", str(tmp_path)) in calls


def with_checkpoint(tmp_path):
    state = RunState(step=7, version=8, synced=True, queue={}, recorder={}, queued={}, in_flight={})
    manifest.write(tmp_path, run_state.write_head(tmp_path, state))
    return recovery(tmp_path, found=tmp_path)


async def test_what_waits_for_a_place_is_named_while_there_is_none_for_a_rank_whose_host_is_gone(tmp_path):
    subject, calls = with_checkpoint(tmp_path)
    events = []

    async def never(_):
        await asyncio.Event().wait()

    subject._trainers = SimpleNamespace(replace=lambda: None, start=never)
    subject._recorder.event = lambda name, **fields: events.append((name, fields["free"]))
    with pytest.raises(
        StalledError,
        match=r"trainer did not start within .*3 CPU, 0 GPU \(not placed: trainer, 2 GPU on one host\) left",
    ):
        await subject.restart(DIED)
    assert events[0] == ("start_takes_long", FREE)
    assert "rewind" not in [name for name, *_ in calls]


async def test_a_start_that_fails_for_want_of_memory_is_a_death_and_is_tried_again(tmp_path):
    subject, _ = with_checkpoint(tmp_path)
    error = RuntimeError("no memory")

    async def fails(_):
        raise error

    subject._trainers = SimpleNamespace(replace=lambda: None, start=fails)
    with pytest.raises(TrainerDied, match="the trainer failed in start: RuntimeError: no memory"):
        await subject.restart(DIED)
    error = ValueError("a fault of the program")
    with pytest.raises(ValueError, match="of the program"):
        await subject.restart(DIED)


async def test_groups_of_a_step_that_was_left_go_back_and_are_no_suspects(tmp_path):
    subject, calls = recovery(tmp_path)
    await subject.give_back(["a", "b"], DIED)
    await subject.give_back(["b", "c"], RuntimeError("left"))
    await subject.give_back(["b", "c"], DIED)
    assert [call for call in calls if call[0] != "batch_set_aside"] == [
        ("release", ["a", "b"]),
        ("release", ["b", "c"]),
        ("fail", "b", "trainer"),
        ("release", ["c"]),
    ]


async def test_without_a_checkpoint_the_failure_is_final(tmp_path):
    subject, calls = recovery(tmp_path)
    with pytest.raises(TrainerError, match=r"no memory, and there is no checkpoint.*checkpoint\.every"):
        await subject.restart(DIED)
    assert calls == []
