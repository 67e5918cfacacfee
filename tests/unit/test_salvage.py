"""What is taken from a worker whose engine has died: all that it has, as long as there is progress."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError
from structlog.testing import capture_logs

from async_rl.driver.salvage import salvage
from async_rl.runtime import timeouts


def value(of):
    """What a reference of Ray's is: something to await."""
    reference = asyncio.get_running_loop().create_future()
    reference.set_result(of)
    return reference


class Worker:
    """Yields a group each ``seconds``; after ``ends_after`` values it dies, or yields no more."""

    def __init__(self, groups=4, seconds=0.0, ends_after=None, responds=True, hangs=False):
        self.groups, self.seconds, self.ends_after = groups, seconds, ends_after
        self.responds, self.hangs = responds, hangs

    async def salvage(self):
        yielded = 0
        for number in range(self.groups):
            await asyncio.sleep(self.seconds)
            for item in (value(f"0-{number}.0"), f"message {number}"):
                if yielded == self.ends_after:
                    if self.hangs:
                        await asyncio.sleep(3600)
                    raise ActorDiedError()
                yield item
                yielded += 1

    async def stats(self):
        if not self.responds:
            await asyncio.sleep(3600)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timeouts, "ANSWER_S", 0.05)


ALL = {f"0-{number}.0": f"message {number}" for number in range(4)}


async def test_what_takes_longer_than_any_answer_is_waited_for_while_groups_come():
    assert await salvage(Worker(seconds=0.12), "rollout-0") == ALL


@pytest.mark.parametrize(("ends_after", "kept"), [(0, 0), (2, 1), (3, 1), (4, 2)])
async def test_what_came_before_the_worker_died_is_kept(ends_after, kept):
    with capture_logs() as logged:
        saved = await salvage(Worker(ends_after=ends_after), "rollout-3")
    assert saved == dict(list(ALL.items())[:kept])
    assert [(line["event"], line["worker"], line["saved"]) for line in logged] == [
        ("salvage_failed", "rollout-3", kept)
    ]


@pytest.mark.parametrize("responds", [False, True])
async def test_a_worker_that_hangs_is_not_waited_for_long(responds):
    async with asyncio.timeout(5):
        saved = await salvage(Worker(ends_after=2, hangs=True, responds=responds), "rollout-0")
    assert list(saved) == ["0-0.0"]
