"""What the integration tests share: a tiny random model, a dataset, and real runs watched from outside."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from layouts import make_checkpoint
from ranks import Ranks

# Issue and README promise that nothing is left this long after any exit.
CLEAN_WITHIN_S = 15
RUN_LIMIT_S = 300


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The demo's model and tokenizer with random weights: the same shapes, without the warm-up."""
    folder = tmp_path_factory.mktemp("model")
    # In a process of its own: transformers and torch would stay loaded in the test process.
    script = (
        "import sys; from pathlib import Path; from async_rl.tiny.model import save_random_model;"
        "from async_rl.tiny.tokenizer import save_tokenizer; folder = Path(sys.argv[1]);"
        "save_tokenizer(folder); save_random_model(folder, 0)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def recipe(tiny_model, tmp_path_factory) -> Path:
    """A small config: 4 groups of 4 per step, responses of up to 120 tokens, pushes after every step."""
    folder = tmp_path_factory.mktemp("recipe")
    subprocess.run([sys.executable, "-m", "async_rl.tiny.task", str(folder)], check=True, capture_output=True)
    tree = {
        "name": "run",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_prompt_tokens": 200,
        },
        "reward": {"function": "async_rl.rollout.rewards.text:partial_credit"},
        "async_training": {"staleness_threshold": 1.0, "max_staleness": 3},
        "rollout": {
            "n": 4,
            "max_response_tokens": 120,
            "max_num_seqs": 16,
            "kv_cache_bytes": 64 * 2**20,
        },
        "trainer": {"steps": 6, "groups_per_step": 4, "optimizer": {"lr": 1e-3}},
        "eval": {"n": 8},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def ranks():
    """Up to four trainer ranks, for whatever layout."""
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    """The small model of ``layouts``."""
    folder = tmp_path_factory.mktemp("model")
    ranks.call(make_checkpoint, folder)
    yield folder
    shutil.rmtree(folder)


class Run:
    """``async-rl train`` in a process of its own, with every process below it on record."""

    def __init__(self, recipe: Path, folder: Path, **settings) -> None:
        self.folder = folder / "runs" / "run"
        arguments = [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]
        self._shm_before = set(os.listdir("/dev/shm"))
        self._output = (folder / "output.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "async_rl.cli", "train", str(recipe), f"--runs={folder / 'runs'}", *arguments],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        )
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def output(self) -> str:
        self._output.flush()
        return Path(self._output.name).read_text()

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def descendants(self, name: str = "") -> list[psutil.Process]:
        return [p for p in self._seen.values() if _alive(p) and name in " ".join(_cmdline(p))]

    @property
    def driver(self) -> int:
        """The child of the supervisor."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + RUN_LIMIT_S
        while not (self.folder / "metrics.jsonl").exists() or len(self.rows) < step:
            assert self.process.poll() is None, f"the run ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"step {step} did not come:\n{self.output}"
            time.sleep(0.1)

    def wait(self) -> int:
        try:
            return self.process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end:\n{self.output}") from None

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + CLEAN_WITHIN_S
        while left := [p for p in self._seen.values() if _alive(p)]:
            assert time.monotonic() < deadline, f"still alive: {[(p.pid, _cmdline(p)) for p in left]}"
            time.sleep(0.2)
        assert len(self._seen) > 5, "the watcher saw no processes, so this check would prove nothing"
        assert set(os.listdir("/dev/shm")) <= self._shm_before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._watcher.join()
        for process in self._seen.values():
            if _alive(process):
                process.kill()
        self._output.close()

    def _watch(self) -> None:
        """Every process ever seen below the run, so that one that escapes is still known."""
        supervisor = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                for process in supervisor.children(recursive=True):
                    self._seen.setdefault((process.pid, process.create_time()), process)
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.1)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def start_run(recipe, tmp_path):
    """start_run(section__key=value, ...) -> Run; ended with everything below it when the test is over."""
    runs = []

    def start(**settings) -> Run:
        runs.append(Run(recipe, tmp_path, **settings))
        return runs[-1]

    yield start
    for run in runs:
        run.close()
