"""The words for a run's events: complete for the driver's events, and harmless for any other line of a log."""

import ast
from pathlib import Path

import pytest

import async_rl
from async_rl.metrics.events import RESTARTS, WORDS, in_words

DRIVER = Path(async_rl.__file__).parent / "driver"


def events_of_the_driver():
    """The constant names that the driver passes to ``Recorder.event``."""
    calls = [node for path in DRIVER.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    calls = [node for node in calls if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "event"]
    return sorted({call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)})


def test_every_event_of_the_driver_has_words():
    names = events_of_the_driver()
    assert "checkpoint_written" in names
    assert [name for name in names if name.isidentifier() and name not in WORDS] == []


def test_restarts_are_events():
    assert set(WORDS) >= RESTARTS


@pytest.mark.parametrize(
    ("event", "fields", "words"),
    [
        (
            "work_restored",
            {"step": 5, "queued": 3, "resumed": 2},
            "restored the run after step 5: 3 groups queued, 2 in flight",
        ),
        (
            "engine_trainer_agree",
            {"max_abs_diff": 1.234e-7, "unreached_experts": 2},
            "engine and trainer agree to 1.2e-07 on the checkpoint's weights (unreached_experts=2)",
        ),
        ("process_died", {"process": "rollout-1", "reissued": 3}, "rollout-1 died and is being restarted (reissued=3)"),
        ("process_died", {"process": "trainer", "step": None}, "trainer died and is being restarted"),
        ("no_such_event", {"n": 3, "of": "a"}, "no_such_event n=3 of=a"),
        ("rollout-0 is back", {}, "rollout-0 is back"),
        ("work_restored", {}, "work_restored"),
        ("engine_trainer_agree", {"max_abs_diff": "small"}, "engine_trainer_agree max_abs_diff=small"),
        ("{step}", {"step": 5}, "{step} step=5"),
    ],
)
def test_words(event, fields, words):
    assert in_words(event, fields) == words
