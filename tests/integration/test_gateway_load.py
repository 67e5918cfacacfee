"""The load of ``tests.bench.gateway``, small: agents in process and over HTTP have their turns, and leave nothing."""

import pytest

from tests.bench.gateway import WAYS, measure, objects_left
from tests.support.gateway_load import Shape

pytestmark = pytest.mark.slow


def test_agents_leave_nothing_in_their_worker():
    shape = Shape(sessions=64, turn_s=0.02, think_s=0.02)
    small, waves = measure(WAYS, shape)
    for wave in waves:
        assert len(wave.calls) == shape.sessions * shape.calls
        assert min(wave.calls) >= shape.turn_s
        assert wave.loop_s > 0
        # asyncio keeps up to a hundred timers that were cancelled, whatever their number; an endpoint is 67 objects.
        assert objects_left(small[wave.way], wave) < 4
