"""The training loop restarts a trainer that died: from which checkpoint, when the newest turns out to be damaged."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

from async_rl.driver import run_state
from async_rl.driver.loop import TrainingLoop
from async_rl.errors import CheckpointDamaged, TrainerDied


class Parts:
    """Everything that a restart calls. Checkpoints are of steps 2 and 4."""

    def __init__(self, damaged):
        self.damaged, self.passed_over, self.calls = damaged, [], []

    async def latest(self):
        return next(path for path in (Path("step-000004"), Path("step-000002")) if str(path) not in self.passed_over)

    def pass_over(self, damaged):
        self.passed_over.append(damaged.path)

    @contextlib.contextmanager
    def phase(self, *_):
        yield

    def replace(self):
        self.calls.append("replace")

    async def start(self, found):
        self.calls.append(f"start {found}")
        if str(found) in self.damaged:
            raise CheckpointDamaged(str(found), "common.pt has another checksum than when it was written")

    def event(self, event, **fields):
        self.calls.append((event, fields))

    def __getattr__(self, name):
        async def anything(*_, **__):
            return []

        return (lambda *_: None) if name == "reconnect" else anything


async def test_a_checkpoint_that_the_ranks_find_damaged_is_passed_over(monkeypatch):
    monkeypatch.setattr(run_state, "read_head", lambda path: SimpleNamespace(step=int(path.name[-6:]), recorder={}))
    parts = Parts(damaged=("step-000004",))
    loop = object.__new__(TrainingLoop)
    for name in ("checkpointer", "monitor", "recovery", "trainers", "queue", "sync"):
        setattr(loop, f"_{name}", parts)
    loop._recorder = SimpleNamespace(samples=parts, rewind=lambda *_: None, event=parts.event)
    loop._step = 5
    loop._sync_weights = parts.anything
    await loop._restart_trainer(TrainerDied("trainer rank 0 died during train_step"))
    assert parts.calls == [
        "replace",
        "start step-000004",
        "replace",
        "start step-000002",
        ("trainer_restarted", {"step": 2, "reissued": 0}),
    ]
    assert loop._step == 2
