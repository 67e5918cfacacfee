"""SIGKILL of every kind of process in every phase, in two runs; CHAOS_KILLS sets how many kills they have together.

They are a file of their own because they take as long as all other tests of chaos, which then run beside them.
"""

import os
import random

import pytest

from tests.chaos.kills import NAMES, SETTINGS, schedule, survive

pytestmark = [pytest.mark.e2e, pytest.mark.long]

KILLS = int(os.environ.get("CHAOS_KILLS", "44"))


@pytest.mark.parametrize("replicas", [1, 2])
def test_training_survives_many_kills(start_run, tmp_path, seed, replicas):
    chance = random.Random(seed + replicas)
    run = start_run(rollout__replicas=replicas, **SETTINGS)
    survive(run, schedule(chance, KILLS // 2, NAMES), tmp_path, seed)
