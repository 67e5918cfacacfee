"""One sentence about why a run failed."""

from pathlib import Path

from ray.exceptions import RayTaskError

from async_rl.errors import AsyncRLError, RewardError, WeightSyncMismatch
from async_rl.runtime.failures import explain

RUN = Path("runs/x")


def test_the_error_that_an_actor_raised_is_told_as_it_was():
    cause = RewardError("reward f, prompt 0-3: returned nan")
    wrapped = RayTaskError("run", "Traceback ...\nRewardError: ...", cause).as_instanceof_cause()
    assert explain(wrapped, RUN) is cause


def test_a_foreign_error_in_an_actor_is_named_with_the_logs():
    wrapped = RayTaskError("run", "Traceback ...\nZeroDivisionError: division by zero", ZeroDivisionError("x"))
    failure = explain(wrapped, RUN)
    assert isinstance(failure, AsyncRLError)
    assert "ZeroDivisionError: division by zero" in str(failure)
    assert "runs/x/logs" in str(failure)
    assert "\n" not in str(failure)


def test_our_own_error_and_a_group_of_errors():
    error = WeightSyncMismatch("canary: ...")
    assert explain(error, RUN) is error
    assert explain(BaseExceptionGroup("several", [error]), RUN) is error


def test_anything_else_keeps_its_name():
    assert str(explain(KeyError("a"), RUN)) == "KeyError: 'a'"
