"""What the driver and the queue do for a run on many hosts grows with groups and with replicas, and with nothing else.

In virtual time, and at a size at which growth shows; ``tests.bench.hosts_at_scale`` has the figures of 64 hosts.
"""

from __future__ import annotations

import functools
import json
import sys

import pytest

from tests.bench import hosts_at_scale
from tests.support.virtual_actors import RANKS, RESPONSES, Size
from tests.support.virtual_cluster import Cost, measure

HOSTS, GROUPS, TOKENS = 1, 16, 256
# Twice as much work for twice the size, and what does not grow. Four times as much is the square.
LINEAR = 2.4


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    """What a run of some size costs; each is made once."""

    @functools.cache
    def of(hosts: int = HOSTS, groups: int = GROUPS, tokens: int = TOKENS) -> Cost:
        return measure(Size(hosts, groups, tokens), tmp_path_factory.mktemp("run") / "run", lines=True)

    return of


SIZES = [{}, {"hosts": 2 * HOSTS}, {"hosts": 4 * HOSTS}, {"groups": 2 * GROUPS}, {"groups": 4 * GROUPS}]


def grows(each: list[float], least: float = 0.0) -> bool:
    """Whether what doubling a size adds is twice what the doubling before added, or nothing to speak of."""
    small, middle, large = each
    return large - middle <= max(LINEAR * (middle - small), least)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_calls_of_a_step_are_some_for_each_group_and_some_for_each_replica(cost, size):
    found = cost(**size)
    groups, replicas, calls = found.size.groups, found.size.replicas, found.by_method("calls")
    assert calls["groups"] == 3 * groups, "announcement, message and metadata"
    assert calls["accepted"] == groups
    assert calls["put_many"] <= groups
    # A part of a step goes to every rank, and has a group for each: that is the most parts.
    parts = groups / RANKS
    assert calls["lease"] <= parts
    assert calls["fetch"] == calls["accumulate"] <= parts * RANKS
    for method in ("pause", "receive", "wake_and_score", "resume"):
        assert calls[method] == replicas, method
    # Its own routing, and that of all engines, which route alike.
    assert (calls["probed_routing"], calls["logprobs"]) == (1, 2 * RANKS)
    assert calls["stage_weights"] == calls["finish_step"] == RANKS
    assert calls["ack"] == calls["advance"] == 1
    assert len(calls) == 16, f"what is new is to be counted here: {calls}"


def test_each_second_has_a_call_to_each_replica_and_three_others(cost):
    for hosts in (HOSTS, 4 * HOSTS):
        found = cost(hosts=hosts)
        assert found.calls_per_second() == found.size.replicas + 3


def test_nothing_grows_with_tokens(cost):
    short, long = cost(), cost(tokens=32_768)
    # Numbers have more digits, and groups of longer responses come one by one.
    assert long.bytes_per_step() < 1.25 * short.bytes_per_step()
    assert long.canary_bytes_per_step() == short.canary_bytes_per_step()
    assert long.journal < 1.25 * short.journal
    assert long.written < 1.1 * short.written
    assert long.bytes_per_second() < 1.1 * short.bytes_per_second()
    assert long.lines_per_step() < 1.25 * short.lines_per_step()
    assert long.lines_per_step("queue") < 1.25 * short.lines_per_step("queue")


@pytest.mark.parametrize("what", ["hosts", "groups"])
def test_nothing_grows_with_the_square_of(cost, what):
    each = [cost(**{what: times * {"hosts": HOSTS, "groups": GROUPS}[what]}) for times in (1, 2, 4)]
    for name in ("bytes_per_step", "canary_bytes_per_step", "lines_per_step", "bytes_per_second", "lines_per_second"):
        values = [getattr(found, name)() for found in each]
        assert grows(values, 0.05 * values[0]), f"{name}: {values}"
    for name in ("lines_per_step", "lines_per_second"):
        values = [getattr(found, name)("queue") for found in each]
        assert grows(values, 0.05 * values[0]), f"{name} of the queue: {values}"
    for name in ("journal", "written"):
        values = [getattr(found, name) for found in each]
        assert grows(values, 0.05 * values[0]), f"{name}: {values}"


def test_a_group_and_a_replica_have_their_price_in_bytes(cost):
    """Metadata crosses the driver's process three times, and a reference to the message twice more."""
    groups = cost(groups=4 * GROUPS).bytes_per_step() - cost(groups=2 * GROUPS).bytes_per_step()
    assert groups / (2 * GROUPS) < 1000 + 100 * RESPONSES
    replicas = cost(hosts=4 * HOSTS).bytes_per_step() - cost(hosts=2 * HOSTS).bytes_per_step()
    assert replicas / (2 * cost().size.replicas) < 250


def test_the_drivers_metrics_are_as_many_whatever_the_size(cost):
    assert len({cost(**size).metric_lines for size in SIZES}) == 1


def test_the_bench_prints_a_table_and_the_price_of_each(monkeypatch, capsys):
    sizes = ("--hosts", "1", "2", "--groups", "16", "32", "--tokens", "256", "1024")
    monkeypatch.setattr(sys, "argv", ["hosts_at_scale", *sizes])
    hosts_at_scale.main()
    head, *rows, found = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows[:2]] == [["1", "16", "256"], ["1", "16", "1024"]]
    assert [len(row) for row in rows] == [len(head)] * 8
    found = json.loads(found)
    assert 0.1 < found["kb_per_replica_sync"] < 0.25
    assert found["kb_long_over_short"] < 1.25
    assert len(found) == 8
    # Times are differences of small ones here, and chance.
    assert min(value for name, value in found.items() if not name.startswith(("us_", "queue_us_"))) > 0
