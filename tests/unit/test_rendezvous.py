"""Where trainer ranks meet: a port that is held from the start, and the interface that reaches it."""

import socket

import pytest

from async_rl.errors import ConfigError, ResourceError
from async_rl.runtime import addresses
from async_rl.trainer import rendezvous
from tests.support.loopbacks import ELSEWHERE, LOOPBACKS, is_held, is_open

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["fe80::1%eth0", "2001:db8::7", "10.0.0.7"],
    "eth1": ["fe80::2%eth1", "2001:db8::8"],
    "ib0": ["fe80::3%ib0", "fe80::4"],
}


@pytest.mark.parametrize("host", LOOPBACKS)
def test_what_one_rank_sets_another_gets(host):
    store, address = rendezvous.open_store(host)
    other = rendezvous.join_store(address)
    store.set("version", "7")
    assert other.get("version") == b"7"
    assert addresses.split_port(address) == (host, store.port)
    assert address.startswith("[") == (":" in host)


def test_the_port_is_held_and_closed_at_every_other_address():
    store, address = rendezvous.open_store("127.0.0.1")
    _, port = addresses.split_port(address)
    assert is_held("127.0.0.1", port)
    assert not is_open(ELSEWHERE, port)
    del store


def test_an_address_of_another_host_cannot_be_listened_at():
    with pytest.raises(ResourceError, match=r"rank 0 cannot listen at 192\.0\.2\.1 .*set cluster\.interface"):
        rendezvous.open_store("192.0.2.1")  # an address for documentation


def test_a_rank_that_is_not_reached_is_one_line(monkeypatch):
    from datetime import timedelta

    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", timedelta(seconds=1))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = addresses.with_port(*closed.getsockname())
        with pytest.raises(ResourceError, match=f"not reach trainer rank 0 at {address} within 1 s; open") as error:
            rendezvous.join_store(address)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "address"), [("eth0", "10.0.0.7"), ("eth1", "2001:db8::8"), ("lo", "127.0.0.1")])
def test_an_interface_gives_its_ipv4_address_or_else_one_of_ipv6_that_others_reach(name, address):
    assert rendezvous.interface_address(name, INTERFACES) == address


def test_an_interface_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ConfigError, match=r"cluster\.interface: eth9 is no .*, which has eth0, eth1, ib0, lo$"):
        rendezvous.interface_address("eth9", INTERFACES)
    with pytest.raises(ConfigError, match=r"cluster\.interface: ib0 has no IP address"):
        rendezvous.interface_address("ib0", INTERFACES)


def test_the_interface_is_that_of_the_route():
    assert rendezvous.interface_towards("127.0.0.1", INTERFACES) == "lo"
    assert rendezvous.interface_towards("127.0.0.1", {"eth0": ["10.0.0.7"]}) is None


def test_gloo_and_nccl_use_the_interface_that_is_set_or_else_that_of_the_route(monkeypatch):
    environment = {"NCCL_SOCKET_IFNAME": "=mlx5"}
    rendezvous.use_interface("lo", "10.0.0.1:1234", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    monkeypatch.setattr(rendezvous, "interface_towards", lambda host: {"10.0.0.1": "eth1"}[host])
    environment = {"NCCL_SOCKET_IFNAME": "=mlx5"}
    rendezvous.use_interface(None, "10.0.0.1:1234", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=mlx5"}


@pytest.mark.parametrize("address", ["127.0.0.1:1234", "[::1]:1234"])
def test_on_one_host_the_libraries_choose(address):
    environment = {}
    rendezvous.use_interface(None, address, environment)
    assert environment == {}


def test_an_interface_that_does_not_exist_is_not_used():
    with pytest.raises(ConfigError, match="nope0"):
        rendezvous.use_interface("nope0", "10.0.0.1:1234", {})
