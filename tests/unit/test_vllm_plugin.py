"""An engine process ends with its parent. Without vLLM: a process of the same kind stands in for the engine core."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from async_rl.config.loading import validate
from async_rl.rollout.engine.vllm.process import ENVIRONMENT, kill_engine_processes, why_not_started
from async_rl.runtime import logs

# argv: when to ask the kernel (before or after the parent is killed), and a folder for signs of life.
SCRIPT = """
import multiprocessing, os, sys, time
from pathlib import Path

def child(when, folder):
    from async_rl.weights.vllm.plugin import die_with_parent
    if when == "before":
        die_with_parent()
    (folder / "ready").write_text(str(os.getpid()))
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.01)
    if when == "after":
        die_with_parent()
    (folder / "outlived").touch()

if __name__ == "__main__":
    when, folder = sys.argv[1], Path(sys.argv[2])
    multiprocessing.get_context("spawn").Process(target=child, args=(when, folder), name="EngineCore").start()
    time.sleep(60)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_parent_takes_its_engine_with_it(when, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script), when, str(tmp_path)]) as parent:
        ready = tmp_path / "ready"
        _wait(lambda: ready.exists() and ready.read_text())
        parent.send_signal(signal.SIGKILL)
    pid = int(ready.read_text())
    _wait(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")
    assert not (tmp_path / "outlived").exists()


def _wait(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_engine_processes_ask_for_amx_where_there_is_any(monkeypatch):
    """Without it a bfloat16 engine dies of an illegal instruction; tests/integration/test_pipeline.py runs one."""
    import torch

    from async_rl.weights.vllm import plugin as vllm_plugin

    asked = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True))
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        vllm_plugin._allow_amx()
        assert bool(asked) == has_amx


def engine_core() -> None:
    """What vLLM's engine core does when it cannot start: loads the plugins, and logs the exception that ends it.

    Stand-ins for what the plugin changes of vLLM, whose import takes ten seconds.
    """
    from async_rl.weights.vllm.plugin import register

    for name in (
        "vllm",
        "vllm.distributed.device_communicators.cpu_communicator",
        "vllm.distributed.weight_transfer.factory",
        "vllm.v1.core.sched.scheduler",
    ):
        sys.modules[name] = mock.MagicMock(__version__="0")
    register()
    try:
        raise ValueError("48 GiB KV cache is needed")
    except ValueError:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")


def test_why_an_engine_does_not_start_is_in_the_message_and_in_the_runs_logs(tmp_path, monkeypatch):
    for name in (logs._FOR_CHILDREN, *ENVIRONMENT):
        monkeypatch.setenv(name, ENVIRONMENT.get(name, ""))
    config = validate({"name": "run", "runs": str(tmp_path), "model": {"path": "m"}, "data": {"train": "t"}})
    path = tmp_path / "run" / "logs" / "rollout-0.EngineCore.libs.log"
    path.parent.mkdir(parents=True)
    path.write_text("KeyError: of an earlier start\n")
    logs.lend_to_children(config.run_dir, "rollout-0")
    before = logs.children_logs(config.run_dir, "rollout-0")
    error = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert "The engine core logged no exception: it was killed" in why_not_started(config, "rollout-0", error, before)
    core = multiprocessing.get_context("spawn").Process(target=engine_core, name="EngineCore")
    core.start()
    core.join(120)
    why = why_not_started(config, "rollout-0", error, before)
    assert why == f"ValueError: 48 GiB KV cache is needed (log: {path})"
    assert "EngineCore failed to start." in path.read_text()
    assert why_not_started(config, "rollout-0", ValueError("no such model"), before) == "no such model"


def test_the_processes_of_an_engine_are_killed_and_no_others():
    spawn = multiprocessing.get_context("spawn")
    names = ["EngineCore_DP1", "VllmWorker-0", "environment"]
    children = [spawn.Process(target=time.sleep, args=(60,), name=name) for name in names]
    for child in children:
        child.start()
    try:
        kill_engine_processes()
        for child in children[:2]:
            child.join(30)
        assert [child.exitcode for child in children] == [-signal.SIGKILL, -signal.SIGKILL, None]
    finally:
        for child in children:
            child.kill()
            child.join()
