"""The doctor's estimate of a run's memory against what all of its processes take together."""

import dataclasses
import json

import pytest

from tests.support import run_memory

pytestmark = [pytest.mark.e2e, pytest.mark.engine, pytest.mark.long]


@pytest.mark.parametrize("make", [run_memory.demo, run_memory.large])
def test_the_doctor_knows_what_a_whole_run_takes(tmp_path, record_property, make):
    recipe = make(tmp_path)
    found, expected = run_memory.taken(recipe), run_memory.estimated(recipe)
    record_property("estimated_over_taken", expected.total / found.peak)  # in the report of --junitxml
    record_property("by_process", json.dumps(found.by_process))  # pytest's workers send nothing but plain types
    record_property("by_part", json.dumps(dataclasses.asdict(expected)))
    assert found.peak == pytest.approx(expected.total, rel=0.15), (found, expected)
