"""A trainer rank as the driver calls it: what it reads, and when. The trainer and the store are stand-ins."""

from types import SimpleNamespace

import pytest

from async_rl.errors import PayloadLost
from async_rl.queue.codec import encode
from async_rl.trainer.worker import TrainerWorker
from tests.unit.test_outbox import group

PAYLOADS = {f"0-{number}.0": [number] for number in range(4)}


class Trainer:
    """Notes the groups that it gets."""

    def __init__(self):
        self.prepared, self.trained = [], []

    def begin_step(self, **_):
        self.trained = []

    def prepare(self, groups, **_):
        self.prepared = [group.group_id for group in groups]

    def train_step(self, groups, **_):
        self.accumulate(groups)

    def accumulate(self, groups):
        self.trained.append([group.group_id for group in groups])


@pytest.fixture
def worker(monkeypatch):
    one = TrainerWorker(SimpleNamespace(), 0, None)
    one._trainer = Trainer()
    one.read, one.lost = [], set()

    def read(payloads):
        one.read += payloads
        return {group_id: encode(group(number)) for group_id, (number,) in payloads.items() if group_id not in one.lost}

    monkeypatch.setattr(one._fetcher, "_read", read)
    return one


def some(*numbers):
    return {f"0-{number}.0": PAYLOADS[f"0-{number}.0"] for number in numbers}


def test_the_groups_of_a_step_are_read_once_and_ahead_of_it(worker):
    batches = [some(0, 1), some(2)]
    assert worker.fetch(batches) == []
    worker.lost = set(PAYLOADS)  # the host dies now
    worker.train_step(batches, 1, 0)
    assert worker._trainer.prepared == ["0-0.0", "0-1.0", "0-2.0"]
    assert worker._trainer.trained == [["0-0.0", "0-1.0"], ["0-2.0"]]
    assert worker.read == ["0-0.0", "0-1.0", "0-2.0"]


def test_what_is_lost_is_named_before_anything_is_computed(worker):
    worker.lost = {"0-1.0", "0-3.0"}
    assert worker.fetch([some(0, 1), some(2, 3)]) == ["0-1.0", "0-3.0"]
    assert worker.fetch([some(0, 2)]) == []
    assert worker.read == ["0-0.0", "0-1.0", "0-2.0", "0-3.0"]
    worker.accumulate([some(0, 2)], 1, 0, first=True)
    assert worker._trainer.trained == [["0-0.0", "0-2.0"]]
    with pytest.raises(PayloadLost, match=r"0-1\.0"):
        worker.accumulate([some(1)], 1, 0, first=False)
