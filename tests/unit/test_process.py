"""Semaphores and shared memory of a run are named after it and their process's role, and removed by that name."""

import multiprocessing
import os
import signal
from multiprocessing import resource_tracker, shared_memory
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


def make_memory(pipe):
    """Make shared memory as a library does, and be killed with it."""
    process.mark_shared_memory()
    memory = shared_memory.SharedMemory(create=True, size=2**12)
    resource_tracker.unregister(memory._name, "shared_memory")  # by which Python would unlink it
    pipe.send(memory.name)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("_a_run")
def test_shared_memory_of_a_process_that_was_killed_is_removed_with_the_semaphores():
    process.mark_semaphores("rollout-0")
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=make_memory, args=(there,))
    child.start()
    path = Path("/dev/shm", here.recv())
    child.join()
    assert path.exists()
    process.remove_semaphores("rollout-1")
    assert path.exists()
    process.remove_semaphores("rollout-0")
    assert not path.exists()


def test_outside_a_run_shared_memory_keeps_its_names(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "semprefix", "/mp")
    monkeypatch.setattr(shared_memory, "_make_filename", names := shared_memory._make_filename)
    process.mark_shared_memory()
    assert shared_memory._make_filename is names


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
