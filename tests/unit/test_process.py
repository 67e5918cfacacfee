"""The semaphores of a run are named after it and the role of their process, and removed by that name."""

import multiprocessing
import os
from pathlib import Path

import pytest

from async_rl.runtime import process


@pytest.fixture
def _a_run(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    config = multiprocessing.current_process()._config
    monkeypatch.setitem(config, "semprefix", config["semprefix"])
    process.begin_run()
    yield
    process.remove_semaphores()


def semaphore(role: str) -> Path:
    """Return the file of a semaphore that a process of this role makes, and that nothing else removes."""
    process.mark_semaphores(role)
    name = multiprocessing.get_context("spawn").Lock()._semlock.name  # removed as the lock is collected
    path = Path(f"/dev/shm/sem.{name[1:]}")
    path.touch()
    return path


@pytest.mark.usefixtures("_a_run")
def test_a_role_removes_its_own_semaphores_at_its_end_and_those_of_its_predecessor_at_its_start():
    first, tenth = semaphore("rollout-1"), semaphore("rollout-10")
    process.remove_semaphores("rollout-1")
    assert (first.exists(), tenth.exists()) == (False, True)
    process.mark_semaphores("rollout-10")
    assert not tenth.exists()


@pytest.mark.usefixtures("_a_run")
def test_a_run_removes_all_of_its_own_semaphores_and_none_of_another_run():
    other = semaphore("rollout-0")
    process.begin_run()
    own = semaphore("rollout-0")
    assert other.exists()
    process.remove_semaphores()
    assert (own.exists(), other.exists()) == (False, True)
    other.unlink()


@pytest.mark.usefixtures("_a_run")
def test_processes_of_other_hosts_get_the_token_in_their_environment(monkeypatch):
    token = process.run_token()
    monkeypatch.setattr(os, "environ", {})
    assert process.run_token() == {}
    process.mark_semaphores("rollout-0")
    assert multiprocessing.current_process()._config["semprefix"] == "/mp"
    os.environ.update(token)
    process.mark_semaphores("rollout-0")
    assert multiprocessing.current_process()._config["semprefix"].endswith("-rollout-0")
