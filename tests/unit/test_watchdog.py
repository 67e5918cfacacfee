"""How long nothing has moved."""

from async_rl.metrics.watchdog import Watchdog, waiting_for


def test_stalled_time_counts_from_the_last_change():
    watchdog = Watchdog()
    assert watchdog.look(10.0, (0, 0)) == 0.0
    assert watchdog.look(13.0, (0, 0)) == 3.0
    assert watchdog.look(14.0, (0, 1)) == 0.0
    assert watchdog.look(15.5, (0, 1)) == 1.5


def test_what_is_waited_for():
    assert waiting_for(leased_groups=4, refusal="budget full") == "update"
    assert waiting_for(leased_groups=0, refusal="budget full") == "admission"
    assert waiting_for(leased_groups=0, refusal=None) == "generation"
