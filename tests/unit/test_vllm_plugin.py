"""An engine process ends with its parent. Without vLLM: a process of the same kind stands in for the engine core."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
