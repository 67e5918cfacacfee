"""The driver of 64 hosts of 8 replicas, in virtual time: each replica costs it what it costs with 8 hosts."""

import pytest

from tests.support.virtual_actors import Size
from tests.support.virtual_cluster import measure


@pytest.mark.long
def test_each_of_512_replicas_costs_the_driver_what_each_of_64_does(tmp_path):
    one, some, many = (measure(Size(hosts, 512, 256), tmp_path / str(hosts)) for hosts in (1, 8, 64))
    assert many.calls_per_second() == 512 + 3
    for name in ("bytes_per_step", "bytes_per_second", "canary_bytes_per_step"):
        first, then = (getattr(b, name)() - getattr(a, name)() for a, b in ((one, some), (some, many)))
        each, later = first / (7 * 8), then / (56 * 8)
        print(f"{name} of a replica: {each:.0f} up to 8 hosts, {later:.0f} from there to 64")
        assert later < 1.1 * each
