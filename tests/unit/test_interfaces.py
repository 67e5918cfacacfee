"""The network interfaces of a host, and which of them process groups use."""

import pytest

from async_rl.errors import ConfigError
from async_rl.runtime import interfaces

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["fe80::1%eth0", "2001:db8::7", "10.0.0.7"],
    "eth1": ["fe80::2%eth1", "2001:db8::8"],
    "ib0": ["fe80::3%ib0", "fe80::4"],
}


@pytest.mark.parametrize(("name", "address"), [("eth0", "10.0.0.7"), ("eth1", "2001:db8::8"), ("lo", "127.0.0.1")])
def test_an_interface_gives_its_ipv4_address_or_else_one_of_ipv6_that_others_reach(name, address):
    assert interfaces.interface_address(name, INTERFACES) == address


def test_an_interface_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ConfigError, match=r"cluster\.interface: eth9 is no .*, which has eth0, eth1, ib0, lo$"):
        interfaces.interface_address("eth9", INTERFACES)
    with pytest.raises(ConfigError, match=r"cluster\.interface: ib0 has no IP address"):
        interfaces.interface_address("ib0", INTERFACES)


def test_the_interface_is_that_of_the_route():
    assert interfaces.interface_towards("127.0.0.1", INTERFACES) == "lo"
    assert interfaces.interface_towards("127.0.0.1", {"eth0": ["10.0.0.7"]}) is None


def test_gloo_and_nccl_use_the_interface_that_is_set_or_else_that_of_the_route(monkeypatch):
    environment = {"NCCL_SOCKET_IFNAME": "=mlx5"}
    interfaces.use_interface("lo", "10.0.0.1", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    monkeypatch.setattr(interfaces, "interface_towards", lambda host: {"10.0.0.1": "eth1"}[host])
    environment = {"NCCL_SOCKET_IFNAME": "=mlx5"}
    interfaces.use_interface(None, "10.0.0.1", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=mlx5"}


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_on_one_host_the_libraries_choose(address):
    environment = {}
    interfaces.use_interface(None, address, environment)
    assert environment == {}


def test_an_interface_that_does_not_exist_is_not_used():
    with pytest.raises(ConfigError, match="nope0"):
        interfaces.use_interface("nope0", "10.0.0.1", {})
