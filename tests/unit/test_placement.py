"""Which cores the processes of a run get."""

import pytest

from async_rl.config.loading import validate
from async_rl.driver.cluster import assign_cores


def config(**resources):
    tree = {"model": {"path": "m"}, "data": {"train": "t"}}
    replicas, ranks = resources.pop("replicas", 1), resources.pop("ranks", 1)
    return validate(
        {
            **tree,
            "rollout": {"replicas": replicas},
            "trainer": {"parallel": {"dp": ranks}},
            "resources": resources,
        }
    )


def test_two_cores_are_split():
    assigned = assign_cores(config(), [0, 1])
    assert assigned.engines == ((0,),)
    assert assigned.trainers == ((1,),)


@pytest.mark.parametrize(("replicas", "ranks", "engine_threads", "trainer_threads"), [(2, 1, 1, 1), (1, 2, 2, 3)])
def test_no_core_is_given_twice(replicas, ranks, engine_threads, trainer_threads):
    settings = config(replicas=replicas, ranks=ranks, engine_threads=engine_threads, trainer_threads=trainer_threads)
    assigned = assign_cores(settings, range(3, 16))
    given = [core for cores in (*assigned.engines, *assigned.trainers) for core in cores]
    assert len(given) == len(set(given)) == replicas * engine_threads + ranks * trainer_threads
    assert set(given) <= set(range(3, 16))


def test_too_few_cores_or_no_pinning_leave_assigned_to_the_system():
    for assigned in (assign_cores(config(replicas=2), [0, 1]), assign_cores(config(pin_cores=False), [0, 1])):
        assert set(assigned.engines) == set(assigned.trainers) == {None}
