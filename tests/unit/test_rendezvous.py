"""Where trainer ranks meet: a port that is held from the start."""

import socket

import pytest

from async_rl.errors import ResourceError
from async_rl.runtime import addresses
from async_rl.trainer import rendezvous
from tests.support.loopbacks import ELSEWHERE, LOOPBACKS, is_held, is_open


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
