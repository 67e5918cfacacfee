"""The driver of 64 hosts of 8 replicas, in virtual time: each replica has its price, however many there are."""

import pytest

from tests.support.virtual_actors import Size
from tests.support.virtual_cluster import measure

# Bytes through the driver's process for each replica; docs/evidence/cluster.md has the figures.
PRICES = {"bytes_per_step": 250, "bytes_per_second": 400, "canary_bytes_per_step": 6000}


@pytest.mark.long
def test_each_of_512_replicas_costs_the_driver_no_more_than_its_price(tmp_path):
    some, many = (measure(Size(hosts, 512, 256), tmp_path / str(hosts)) for hosts in (8, 64))
    assert many.calls_per_second() == 512 + 3
    for name, price in PRICES.items():
        each = (getattr(many, name)() - getattr(some, name)()) / (56 * 8)
        print(f"{name} of a replica: {each:.0f}")
        assert each < price, name
