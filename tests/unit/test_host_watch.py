"""Hosts that leave are noticed by one look at all of them, however many wait."""

import asyncio

from async_rl.driver.host_watch import HostWatch


class Cluster:
    def __init__(self, *hosts):
        self.hosts, self.looks, self.silent = set(hosts), 0, False

    async def alive(self):
        self.looks += 1
        if self.silent:
            raise ConnectionError("the head does not answer")
        return set(self.hosts)


async def test_a_wait_for_a_host_to_leave_ends_when_it_has_left_and_no_other_wait_does():
    cluster = Cluster("a", "b")
    watch = HostWatch(cluster.alive, 0.01)
    on_a = [asyncio.ensure_future(watch.gone("a")) for _ in range(100)]
    on_b = asyncio.ensure_future(watch.gone("b"))
    await asyncio.sleep(0.05)
    assert cluster.looks <= 6, "one look serves all"
    assert not any(gone.done() for gone in (*on_a, on_b))
    cluster.hosts = {"b"}
    await asyncio.wait_for(asyncio.gather(*on_a), 5)
    assert not on_b.done()
    assert await watch.is_gone("a")
    assert not await watch.is_gone("b")
    on_b.cancel()


async def test_nothing_is_asked_while_nothing_waits():
    cluster = Cluster("a")
    watch = HostWatch(cluster.alive, 0.01)
    waiting = asyncio.ensure_future(watch.gone("a"))
    await asyncio.sleep(0.03)
    waiting.cancel()
    await asyncio.sleep(0.03)
    looks = cluster.looks
    await asyncio.sleep(0.05)
    assert cluster.looks == looks
    again = asyncio.ensure_future(watch.gone("a"))
    cluster.hosts.clear()
    await asyncio.wait_for(again, 5)


async def test_a_head_that_does_not_answer_is_no_loss_of_hosts():
    cluster = Cluster("a")
    cluster.silent = True
    watch = HostWatch(cluster.alive, 0.01)
    waiting = asyncio.ensure_future(watch.gone("a"))
    await asyncio.sleep(0.05)
    assert cluster.looks > 1
    assert not waiting.done()
    assert not await watch.is_gone("a")
    cluster.silent = False
    cluster.hosts.clear()
    await asyncio.wait_for(waiting, 5)
