"""How long nothing has moved, and what waits for what."""

import pytest

from async_rl.driver.watchdog import EndShare, RunSnapshot, Watchdog, describe_stall, waiting_for


def snapshot(**fields):
    defaults = {
        "phase": "groups",
        "phase_s": 40.0,
        "queued_groups": 1,
        "required_groups": 4,
        "in_flight": {"rollout-2": 3},
        "refusal": None,
    }
    return RunSnapshot(**defaults | fields)


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
        ({"in_flight": {}}, "generation"),
        ({"refusal": "budget full: 4 of 4"}, "generation"),
        ({"in_flight": {}, "refusal": "budget full: 4 of 4"}, "admission"),
        ({"phase": "update"}, "update"),
        ({"phase": "push"}, "push"),
        ({"phase": "push", "unresponsive": ("rollout-1",)}, "answer"),
    ],
)
def test_what_is_waited_for(fields, what):
    assert waiting_for(snapshot(**fields)) == what


def test_the_description_names_what_waits_for_what_and_for_how_long():
    line = describe_stall(snapshot(refusal="budget full: 4 of 4 groups of window 7", restarting=("rollout-1",)), 61.0)
    assert line == (
        "nothing has moved for 61 s; trainer has waited 40 s for groups (1 queued, 4 needed for a step); groups in "
        "flight: 3 on rollout-2; no more are admitted: budget full: 4 of 4 groups of window 7; restarting: rollout-1"
    )
    assert describe_stall(snapshot(without_host=3), 61.0).endswith("; replicas that wait for a host: 3")
    line = describe_stall(snapshot(phase="push", unresponsive=("rollout-2",)), 61.0)
    assert "training loop has been in `push` for 40 s" in line
    assert line.endswith("no response from: rollout-2")


def test_a_share_is_of_the_last_groups_only():
    rate = EndShare(100)
    assert rate.look(0, 0) == 0.0
    assert rate.look(0, 50) == 0.5  # the fifty that have not ended count as trained
    assert rate.look(50, 50) == 0.5
    assert rate.look(100, 50) == 0.0
    assert rate.look(150, 120) == pytest.approx(70 / 120)  # since the last poll before the window
    assert rate.look(100, 120) == 0.0  # after a rewind the count begins again
    assert rate.look(100, 121) == 0.01


def test_what_failed_before_a_run_was_restored_does_not_end_it():
    """Rows that other settings made unusable, for example, which are all given up at the restore."""
    rate = EndShare(100)
    assert rate.look(50, 600) == 0.0
    assert rate.look(60, 610) == 0.1
