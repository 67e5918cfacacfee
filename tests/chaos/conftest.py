"""The seed of what chaos is random: CHAOS_SEED repeats a schedule."""

import os

import pytest


@pytest.fixture(scope="session")
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED", "0"))
    print(f"CHAOS_SEED={chosen}")
    return chosen
