"""A thousand replicas and a million groups, in virtual time."""

import time

import pytest

from tests.support.simulation import Fleet


@pytest.mark.long
def test_a_thousand_replicas_train_a_million_groups():
    began = time.perf_counter()
    fleet = Fleet(
        replicas=1000,
        capacity=8,
        required=4000,
        checkpoint_every=10,
        deaths=1e-4,
        trainer_deaths=0.01,
        never_finish=1e-3,
        rows=100_000,
    )
    fleet.run(250)
    counts = fleet.broker.counts()
    assert counts.trained == 1_000_000
    print(
        f"{counts.trained:,} groups trained, {counts.issued:,} issued, {counts.returned:,} returned, {counts.failed:,} "
        f"given up; {fleet.happened['die']} deaths of replicas; {fleet.version - 250} of the trainer; "
        f"{time.perf_counter() - began:.0f} s"
    )
