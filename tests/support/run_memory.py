"""Takes the memory of a run on CPU, which is of the demo's size or has a random model of 107 million parameters.

What its processes take is the sum of their proportional set sizes: what several of them share counts once, libraries
and Ray's object store too.
"""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from async_rl.config.loading import load
from async_rl.doctor import estimate
from async_rl.models.config import read_model_config
from tests.support.listeners import name_of
from tests.support.trainer_memory import SIZES

ROOT = Path(__file__).resolve().parents[2]

# Long enough for a few weight syncs, in which most is taken, and for the export at the end.
STEPS = 6
_BETWEEN_SAMPLES_S = 0.25

# In a process of its own: torch would stay loaded in this one.
_MAKE_MODEL = """
import sys
from pathlib import Path
from async_rl.demo.tokenizer import save_tokenizer
from tests.support.trainer_memory import SIZES, make_model
make_model(Path(sys.argv[1]), SIZES["large"])
save_tokenizer(Path(sys.argv[1]))
"""


@dataclass
class Taken:
    """What the processes of a run take."""

    peak: int = 0
    """Bytes of all of them together, at the peak."""
    by_process: Counter[str] = field(default_factory=Counter)
    """The bytes of each kind of process at that moment."""
    samples: int = 0


def demo(folder: Path) -> Path:
    """Write the demo's recipe with fewer steps."""
    tree = yaml.safe_load((ROOT / "configs" / "tiny_moe.yaml").read_text())
    return _write(folder, tree | {"trainer": tree["trainer"] | {"steps": STEPS}, "eval": {"n": 8}})


def large(folder: Path) -> Path:
    """Write the recipe, the model and the data of a run whose microbatches are as full as the settings allow."""
    size = SIZES["large"]
    model = folder / "model"
    subprocess.run([sys.executable, "-c", _MAKE_MODEL, str(model)], check=True, cwd=ROOT, capture_output=True)
    rng = random.Random(0)
    prompts = ("".join(rng.choices(string.ascii_lowercase, k=size.prompt)) for _ in range(200))
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    tree = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": size.prompt},
        # A random model's responses are alike to any other reward, and what has no advantage is not computed.
        "reward": {"function": "tests.support.user_rewards:by_chance"},
        "rollout": {"n": size.n, "max_response_tokens": size.response, "max_num_seqs": 16, "kv_cache_bytes": 2**28},
        "trainer": {
            "steps": STEPS,
            "groups_per_step": size.groups,
            "tokens_per_microbatch": size.sequences * (size.prompt + size.response - 1),
        },
    }
    return _write(folder, tree)


def _write(folder: Path, tree: dict) -> Path:
    tree |= {"name": "run", "runs": str(folder / "runs"), "resources": {"device": "cpu"}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def estimated(recipe: Path) -> estimate.RunMemory:
    """Return what doctor expects of a run, before it."""
    config = load(recipe)
    model = read_model_config(config.model.path)
    return estimate.run_memory(config, model, estimate.count_parameters(config.model.path, model))


def taken(recipe: Path) -> Taken:
    """Run ``async-rl train`` to its end, and return what its processes take. Raises RuntimeError if it fails."""
    log = recipe.with_name("output.txt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "async_rl.cli", "train", str(recipe)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        found = Taken()
        try:
            root = psutil.Process(run.pid)
            while run.poll() is None:
                _sample(root, found)
                time.sleep(_BETWEEN_SAMPLES_S)
        finally:
            if run.poll() is None:
                run.terminate()  # ends all of its processes
            run.wait()
    if run.returncode != 0:
        raise RuntimeError(f"exit code {run.returncode}\n{log.read_text()[-4000:]}")
    return found


def _sample(root: psutil.Process, found: Taken) -> None:
    """Add up what the processes take now, and keep it if it is the most."""
    by_process: Counter[str] = Counter()
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        by_process[name_of(process)] += _proportional_bytes(process.pid)
    found.samples += 1
    if (total := by_process.total()) > found.peak:
        found.peak, found.by_process = total, by_process


def _proportional_bytes(pid: int) -> int:
    """Return a process's proportional set size in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
