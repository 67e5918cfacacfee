"""One sentence about why a run failed."""

from pathlib import Path

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    RayTaskError,
)

from async_rl.errors import AsyncRLError, RewardError, TrainerError, WeightSyncMismatch
from async_rl.runtime.failures import explain, is_machine_fault, is_worker_lost

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


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), ActorUnavailableError("broken pipe", None), NodeDiedError("n"), ActorUnschedulableError("n")],
)
def test_a_worker_whose_host_is_gone_is_lost_and_one_that_tells_of_another_is_not(error):
    assert is_worker_lost(error)
    assert not is_worker_lost(RayTaskError("start", "traceback", error).as_instanceof_cause())
    assert not is_worker_lost(ObjectLostError("00", None, ""))


def test_a_fault_of_the_machine_differs_from_one_of_the_program():
    for fault in (RuntimeError("no memory"), OSError(5, "I/O error"), ObjectLostError("00", None, "")):
        assert is_machine_fault(RayTaskError("start", "traceback", fault))
    for fault in (TrainerError("no replay"), ValueError("x"), KeyError("x")):
        assert not is_machine_fault(RayTaskError("start", "traceback", fault))
