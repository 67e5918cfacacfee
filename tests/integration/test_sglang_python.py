"""A real SGLang server under another Python, whose environment has what SGLang requires and nothing else of the run's.

In place of what the lock for GPUs installs it has links to the same packages of this environment, as far as these are
here: their versions are those for a CPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from tests.integration.engine_conformance import GREEDY, SHORT_PROMPT, reference, token_logprobs
from tests.support.engine_checkpoint import Pusher, engine_config, make_checkpoint, perturbed, running
from tests.support.needs import NEEDS_SGLANG

ROOT = Path(__file__).parents[2]
ONLY_OURS = ("ray", "vllm", "megatron", "msgpack", "structlog", "pydantic_settings")

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio, NEEDS_SGLANG]


@pytest.fixture
def python(tmp_path):
    """The Python of the environment."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    lock = (ROOT / "requirements" / "sglang-gpu.txt").read_text()
    # On a CPU SGLang is installed without some that it requires of its own accord, and torch without others.
    names = {normalized(name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    for distribution in metadata.distributions():
        if normalized(distribution.metadata["Name"]) not in names:
            continue
        for file in distribution.files or ():
            top = Path(distribution.locate_file(file.parts[0]))
            if top.exists() and file.parts[0] not in ("..", "__pycache__") and not (site / top.name).exists():
                (site / top.name).symlink_to(top)
    return folder / "bin" / "python"


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


async def test_a_server_of_another_environment_serves_and_takes_weights(python, tmp_path, monkeypatch):
    check = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    ours = subprocess.run([python, "-c", check, *ONLY_OURS], capture_output=True, text=True, check=True, cwd="/")
    assert ours.stdout == "[]\n"
    # As in a run whose package is installed beside all others of its environment.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{next(path for path in sys.path if path.endswith('site-packages'))}")
    folder = make_checkpoint(tmp_path / "model", dense=())
    weights = load_file(folder / "model.safetensors")
    config = engine_config(folder, runs=tmp_path / "runs", engine="sglang", sglang={"python": str(python)})
    async with running(config) as engine:
        server = engine._server._process
        assert server.args[0] == str(python)
        assert psutil.Process(server.pid).environ()["PYTHONPATH"] == str(engine._server.folder / "package")
        trainer = Pusher(engine, weights)
        await trainer.connect()
        pushed = perturbed(weights)
        await trainer.push(pushed)
        output = await engine.generate("one", SHORT_PROMPT, GREEDY, 12)
        sequence = np.concatenate([SHORT_PROMPT, output.token_ids])
        expected = token_logprobs(reference(folder, pushed)(sequence)[0], sequence)[len(SHORT_PROMPT) - 1 :]
        np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)
        trainer.sender.shutdown()
