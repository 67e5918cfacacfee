"""The end of an engine, however it comes, and the repair of vLLM that a reload needs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from tests.support.engine_checkpoint import engine_config, make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Started as a script: vLLM spawns its engine core, which imports the main module again.
PARENT = """
import asyncio, sys
import numpy as np, psutil
from async_rl.config.schema import RunConfig
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.engine.vllm.engine import VllmEngine

async def main():
    engine = VllmEngine(RunConfig.model_validate_json(sys.argv[1]), replica=1)
    await engine.start()
    await engine.pause("keep")
    call = asyncio.create_task(engine.generate("waits", np.arange(2, 9, dtype=np.int32), Sampling(1.0, 1.0), 9))
    print("PIDS", *(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await engine.shutdown()
    print(repr((await asyncio.gather(call, return_exceptions=True))[0]))

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["shutdown", "SIGKILL"])
def test_nothing_of_the_engine_outlives_its_parent(end, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    config = engine_config(make_checkpoint(tmp_path / "model")).model_dump_json()
    with subprocess.Popen(
        [sys.executable, str(script), config],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            line = next((line for line in parent.stdout if line.startswith("PIDS")), "")
            pids = [int(word) for word in line.split()[1:]]
            shared = set().union(*(shared_files(pid) for pid in [parent.pid, *pids]))
            if end == "shutdown":
                output, errors = parent.communicate("\n", timeout=60)
                assert parent.returncode == 0, errors
                assert "EngineError('replica 1: the engine is not running')" in output
                assert "Traceback" not in errors, errors
        finally:
            parent.send_signal(signal.SIGKILL)
    assert pids, "the engine did not start"
    deadline = time.monotonic() + 15
    while left := [pid for pid in pids if alive(pid)] or [path for path in shared if Path(path).exists()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def alive(pid):
    """A zombie has ended; who reaps it is not the engine's business."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def shared_files(pid):
    """Named shared memory that a process maps, semaphores included. Others on this machine have their own."""
    return set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))


def test_vllm_still_skips_packing_on_reload():
    """Why ``moe_repack`` exists. When this fails, vLLM packs on a reload by itself and the file can go."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    kernel = mock.Mock()
    method = mock.Mock(moe_kernel=None, unquantized_backend=module.UnquantizedMoeBackend.CPU)
    method._init_moe_kernel = lambda layer: setattr(method, "moe_kernel", kernel)
    setup = module.UnquantizedFusedMoEMethod._setup_kernel
    with (
        mock.patch.object(module, "convert_to_unquantized_kernel_format", return_value=(None, None)),
        mock.patch.object(module, "replace_parameter"),
    ):
        setup(method, mock.Mock(), None, None)
        assert kernel.fused_experts.process_weights_after_loading.call_count == 1
        setup(method, mock.Mock(), None, None)
        assert kernel.fused_experts.process_weights_after_loading.call_count == 1
