"""Which cores are near each GPU of this host, against what NVML says of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpus")]

# As a trainer rank begins. Prints its cores before and after, and those that NVML calls near its GPU.
RANK = """
import json, os, pynvml
from async_rl.config.operation import ResourcesSection
from async_rl.runtime.numa import own_cores
from async_rl.runtime.process import pin

allowed = os.sched_getaffinity(0)
if (own := own_cores(None, ResourcesSection(device="cuda"))) is not None:
    pin(own)
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(int(os.environ["CUDA_VISIBLE_DEVICES"]))
words = pynvml.nvmlDeviceGetCpuAffinity(handle, (os.cpu_count() + 63) // 64)
near = [64 * index + bit for index, word in enumerate(words) for bit in range(64) if word >> bit & 1]
print(json.dumps([sorted(allowed), sorted(os.sched_getaffinity(0)), near]))
"""


@pytest.mark.needs(1)
def test_a_rank_is_bound_to_the_cores_that_nvml_calls_near_its_gpu(gpus):
    if not Path("/sys/devices/system/node/node1").exists():
        pytest.skip("this host has one NUMA node")
    for gpu in range(gpus):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        command = [sys.executable, "-c", RANK]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        allowed, bound, near = map(set, json.loads(finished.stdout.splitlines()[-1]))
        assert bound == ((near & allowed) or allowed)
