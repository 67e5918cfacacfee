"""Addresses as text, and the address by which other hosts reach this one."""

import pytest

from async_rl.runtime.addresses import address_towards, split_port, with_port


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


def test_the_address_on_the_route():
    assert address_towards("127.0.0.1:9") == "127.0.0.1"
    assert address_towards("127.5.5.5:9") in ("127.0.0.1", "127.5.5.5")
    assert address_towards("no-such-host.invalid:9") is None
