"""A training loop of which only the part from lease to update is there; queue, trainer and records are given."""

import contextlib
from types import SimpleNamespace

from async_rl.config.training import ParallelSection
from async_rl.driver.leases import LeasedGroups
from async_rl.driver.loop import TrainingLoop
from async_rl.driver.shares import rank_shares


def bare_loop(queue, trainers, recorder, *, groups: int, batches: int = 1, ranks: int = 1) -> TrainingLoop:
    """Return a loop at step 0 and version 0, with steps of ``batches`` mini-batches of ``groups``."""
    loop = TrainingLoop.__new__(TrainingLoop)
    sizes = ParallelSection(dp=ranks)
    loop._config = SimpleNamespace(
        required_groups=groups * batches,
        trainer=SimpleNamespace(groups_per_step=groups, parallel=sizes),
        async_training=SimpleNamespace(max_staleness=1),
    )

    async def nothing(*_):
        return None

    loop._queue, loop._trainers, loop._recorder = queue, trainers, recorder
    loop._shares = lambda batch, loads=None: rank_shares(batch, sizes, float, loads)
    loop._groups = LeasedGroups(queue, trainers, recorder)
    loop._monitor = SimpleNamespace(phase=lambda *_: contextlib.nullcontext(), poll=nothing)
    loop._replicas = SimpleNamespace(admit=nothing)
    loop._pusher = SimpleNamespace(version=0, synced_step=0, finished=nothing, under_way=lambda: False)
    loop._step, loop._stopping = 0, False
    return loop
