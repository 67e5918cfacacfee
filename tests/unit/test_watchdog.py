"""How long nothing has moved, and who waits for whom."""

import pytest

from async_rl.driver.watchdog import Situation, Watchdog, account, waiting_for


def situation(**fields):
    defaults = {
        "trainer": "groups",
        "trainer_s": 40.0,
        "queued_groups": 1,
        "required_groups": 4,
        "running": {"rollout-2": 3},
        "refusal": None,
    }
    return Situation(**defaults | fields)


def test_stalled_time_counts_from_the_last_change():
    watchdog = Watchdog()
    assert watchdog.look(10.0, (0, 0)) == 0.0
    assert watchdog.look(13.0, (0, 0)) == 3.0
    assert watchdog.look(14.0, (0, 1)) == 0.0
    assert watchdog.look(15.5, (0, 1)) == 1.5


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "generation"),
        ({"running": {}}, "generation"),
        ({"refusal": "budget full: 4 of 4"}, "generation"),
        ({"running": {}, "refusal": "budget full: 4 of 4"}, "admission"),
        ({"trainer": "update"}, "update"),
        ({"trainer": "push"}, "push"),
        ({"trainer": "push", "silent": ("rollout-1",)}, "answer"),
    ],
)
def test_what_is_waited_for(fields, what):
    assert waiting_for(situation(**fields)) == what


def test_the_account_names_who_waits_for_whom_and_since_when():
    line = account(situation(refusal="budget full: 4 of 4 groups of window 7", absent=("rollout-1",)), 61.0)
    assert line == (
        "nothing has moved for 61 s; the trainer has waited 40 s for groups: 1 are queued, a step takes 4; groups in "
        "flight: 3 on rollout-2; no more are issued: budget full: 4 of 4 groups of window 7; being started again: "
        "rollout-1"
    )
    line = account(situation(trainer="push", silent=("rollout-2",)), 61.0)
    assert "the training loop is in its push since 40 s" in line
    assert line.endswith("no answer from: rollout-2")
