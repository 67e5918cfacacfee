"""A whole run on GPUs whose weights travel over NCCL, from one trainer rank and from several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SGLANG = ROOT / ".venv-sglang" / "bin" / "python"

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpus")]


def run(folder: Path, **settings: object) -> dict:
    """``async-rl train`` of the demo on GPUs; its summary."""
    everything = {
        "name": "run",
        "runs": folder,
        "trainer.steps": 4,
        "eval.n": 8,
        "resources.device": "cuda",
        "model.dtype": "bfloat16",
        "sync.backend": "nccl",
        **settings,
    }
    arguments = [word for key, value in everything.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "async_rl.cli", "train", "configs/tiny_moe.yaml", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.needs(2)
def test_a_push_over_nccl_passes_the_canary(tmp_path):
    assert run(tmp_path)["exit_reason"] == "finished"


@pytest.mark.needs(5)
@pytest.mark.parametrize("senders", ["one", "stages"])
def test_a_push_over_nccl_from_a_parallel_trainer_passes_the_canary(tmp_path, senders):
    sizes = {"trainer.parallel.tp": 2, "trainer.parallel.ep": 2, "trainer.parallel.pp": 2}
    assert run(tmp_path, **sizes, **{"sync.senders": senders})["exit_reason"] == "finished"


@pytest.mark.needs(2)
@pytest.mark.skipif(not SGLANG.exists(), reason="make setup ENGINE=sglang DEVICE=cuda was not run")
def test_a_push_over_nccl_to_sglang_passes_the_canary(tmp_path):
    engine = {"rollout.engine": "sglang", "rollout.sglang.python": SGLANG}
    assert run(tmp_path, **engine)["exit_reason"] == "finished"
