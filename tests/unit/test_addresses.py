"""Addresses as text, and the address by which other hosts reach this one."""

import pytest

from async_rl.errors import ResourceError
from async_rl.runtime.addresses import address_towards, hold_port, split_port, with_port
from tests.support.loopbacks import ELSEWHERE, LOOPBACKS, is_held, is_open


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("[fd00::1]:6379", ("fd00::1", 6379)),
        ("head.local:80", ("head.local", 80)),
    ],
)
def test_host_and_port(text, parts):
    assert split_port(text) == parts
    assert with_port(*parts) == text


@pytest.mark.parametrize("text", ["auto", "", ":80", "host:", "ray://head:x"])
def test_no_host_and_port(text):
    assert split_port(text) is None
    assert address_towards(text) is None


@pytest.mark.parametrize("host", LOOPBACKS)
def test_a_port_is_held_from_the_start_and_closed_at_every_other_address(host):
    with hold_port(host) as listening:
        port = listening.getsockname()[1]
        assert is_held(host, port)
        assert is_open(host, port)
        assert not is_open(ELSEWHERE, port)
    assert not is_held(host, port)


def test_a_port_cannot_be_held_at_an_address_of_another_host():
    with pytest.raises(ResourceError, match=r"cannot listen at 192\.0\.2\.1 \(.*set cluster\.interface"):
        hold_port("192.0.2.1")  # an address for documentation
    with pytest.raises(ResourceError, match=r"no-such-host\.invalid is no address of a host"):
        hold_port("no-such-host.invalid")


def test_the_address_on_the_route():
    assert address_towards("127.0.0.1:9") == "127.0.0.1"
    assert address_towards("127.5.5.5:9") in ("127.0.0.1", "127.5.5.5")
    assert address_towards("no-such-host.invalid:9") is None
