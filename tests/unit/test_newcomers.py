"""Hosts that join while a run lasts: each is asked once, and one that lacks something is named and gets no replica."""

import asyncio
import dataclasses
import threading

import pytest
import structlog

from async_rl.driver.hosts import Survey
from async_rl.driver.newcomers import Newcomers
from async_rl.errors import ConfigError
from tests.unit.test_doctor_cluster import config, host


class Hosts:
    """What hosts answer, by id; the driver's is node1."""

    def __init__(self, *answers):
        self.answers, self.asked = {answer.node_id: answer for answer in answers}, []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def survey(self, config, only):
        self.asked += only
        assert self.may_answer.wait(10)
        if isinstance(fault := self.answers.get(only[0]), Exception):
            raise fault
        return Survey([] if fault is None else [fault], host(1))


async def test_a_host_that_was_there_when_the_run_started_is_not_asked():
    hosts = Hosts()
    assert await Newcomers(config(), ["node1", "node2"], hosts.survey).fits("node2")
    assert hosts.asked == []


async def test_a_host_is_asked_once_however_many_replicas_come_there():
    hosts = Hosts(host(2), host(3, python="3.12.1"))
    newcomers = Newcomers(config(), ["node1"], hosts.survey)
    hosts.may_answer.clear()
    on_2 = [asyncio.ensure_future(newcomers.fits("node2")) for _ in range(8)]
    on_3 = [asyncio.ensure_future(newcomers.fits("node3")) for _ in range(8)]
    await asyncio.sleep(0)
    on_2.pop().cancel()  # the run no longer wants that one
    assert newcomers.selectors(1) is None
    with structlog.testing.capture_logs() as lines:
        hosts.may_answer.set()
        assert set(await asyncio.gather(*on_2)) == {True}
        assert set(await asyncio.gather(*on_3)) == {False}
        assert not await newcomers.fits("node3")
    assert sorted(hosts.asked) == ["node2", "node3"]
    (line,) = lines
    assert (line["event"], line["host"], line["log_level"]) == ("host_unfit", "10.0.0.3", "warning")
    assert line["reason"].startswith("Python: the driver has 3.11, other hosts do not (10.0.0.3: 3.12); install")
    assert newcomers.selectors(2) == [{"ray.io/node-id": "!in(node3)"}] * 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (dataclasses.replace(host(2), fault="no answer within 120 s"), "hosts: 10.0.0.2: no answer within 120 s; "),
        (ConfigError("runs: cannot write to /runs"), "it could not be checked: ConfigError: runs: cannot write to"),
    ],
)
async def test_a_host_that_cannot_be_checked_gets_no_replica_and_ends_no_run(answer, reason):
    hosts = Hosts()
    hosts.answers["node2"] = answer
    newcomers = Newcomers(config(), [], hosts.survey)
    with structlog.testing.capture_logs() as lines:
        assert not await newcomers.fits("node2")
    assert [line["reason"].startswith(reason) for line in lines] == [True]


async def test_a_host_that_has_left_while_it_was_asked_is_left_to_what_notices_that():
    assert await Newcomers(config(), [], Hosts().survey).fits("node2")
