"""When a checkpoint is due: by steps, by time, because asked for."""

from async_rl.config.operation import CheckpointSection
from async_rl.driver.checkpoint_schedule import CheckpointSchedule


def due(schedule, *moments):
    return [step for step, now in moments if schedule.due(step, now)]


def test_none_are_due_by_default():
    settings = CheckpointSection()
    assert not settings.periodic
    assert due(CheckpointSchedule(settings, 0.0), *((step, 1e6 * step) for step in range(1, 50))) == []


def test_by_steps():
    schedule = CheckpointSchedule(CheckpointSection(every=3), 0.0)
    assert due(schedule, *((step, float(step)) for step in range(1, 10))) == [3, 6, 9]


def test_by_time_since_the_last_one_whatever_its_cause():
    settings = CheckpointSection(every=10, every_s=60.0)
    assert settings.periodic
    moments = [(1, 30.0), (2, 59.0), (3, 61.0), (4, 120.0), (5, 122.0), (10, 150.0), (11, 200.0), (12, 211.0)]
    assert due(CheckpointSchedule(settings, 0.0), *moments) == [3, 5, 10, 12]


def test_at_the_end_of_the_step_in_which_it_was_asked_for():
    schedule = CheckpointSchedule(CheckpointSection(), 0.0)
    schedule.request()
    schedule.request()
    assert due(schedule, (4, 1.0), (5, 2.0)) == [4]
