"""Runs ``async-rl train`` in a process of its own, and watches its files, its processes, and what remains of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import yaml

from async_rl.runtime.rolling import open_part, parts
from tests.support.processes import alive, words

# The README promises that nothing is left 15 s after any exit. A busy machine may need longer, but a process that was
# forgotten stays. Both limits end a test that hangs, and judge no time.
CLEAN_WITHIN_S = 60
RUN_LIMIT_S = 900
# For what asserts nothing about vLLM: broker, Ray, driver and trainer are real.
SCRIPTED = {"rollout__engine": "tests.support.scripted_engine:ScriptedEngine"}
ROOT = Path(__file__).resolve().parents[2]


def make_model(folder: Path) -> Path:
    """Write the demo's model and tokenizer with random weights: the same shapes, without the warm-up."""
    # In a process of its own: transformers and torch would stay loaded in this one.
    script = (
        "import sys; from pathlib import Path; from async_rl.demo.model import save_random_model;"
        "from async_rl.demo.tokenizer import save_tokenizer; folder = Path(sys.argv[1]);"
        "save_tokenizer(folder); save_random_model(folder, 0)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
    return folder


def make_recipe(folder: Path, model: Path) -> Path:
    """Write a small config: 4 groups of 4 per step, responses of up to 120 tokens, weight syncs after every step."""
    subprocess.run([sys.executable, "-m", "async_rl.demo.task", str(folder)], check=True, capture_output=True)
    tree = {
        "name": "run",
        "model": {"path": str(model), "dtype": "float32"},
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


class Run:
    """One start of the run "run" in ``folder``, with every process below it on record."""

    def __init__(self, recipe: Path, folder: Path, *, resume: bool = False, **settings) -> None:
        self.folder = folder / "runs" / "run"
        arguments = [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]
        self._shm_before = set(os.listdir("/dev/shm"))
        self.recipe = recipe
        self._output = (folder / "output.txt").open("a+" if resume else "w+")
        arguments += ["--resume", "auto"] if resume else []
        self.process = self._start(
            [sys.executable, "-m", "async_rl.cli", "train", str(recipe), f"--runs={folder / 'runs'}", *arguments]
        )
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _start(self, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self.folder.parent.parent,
            # For the rewards and environments in tests.support.
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )

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
        seen = list(self._seen.values())  # the watcher adds to it
        return [p for p in seen if alive(p) and name in " ".join(words(p))]

    @property
    def trained(self) -> list[dict]:
        """The groups of each training step."""
        return [json.loads(line) for part in parts(self.folder / "trained.jsonl") for line in open_part(part)]

    @property
    def log(self) -> list[dict]:
        """The driver's log lines, of all starts."""
        return [json.loads(line) for line in (self.folder / "logs" / "pipeline.jsonl").read_text().splitlines()]

    def events(self, name: str) -> list[dict]:
        """Return the driver's log lines of one event."""
        return [line for line in self.log if line["event"] == name]

    def one(self, name: str) -> psutil.Process:
        """Return the newest process of that name. Forks, which have the same name, do not count."""
        found = self.descendants(name)
        pids = {process.pid for process in found}
        found = [process for process in found if process.ppid() not in pids]
        assert found, f"no process {name!r} below the run"
        return max(found, key=lambda process: process.create_time())

    def metrics(self, process: str) -> str:
        """Return /metrics of "pipeline", "rollout", "rollout-1", "trainer", ...; "" while it is not served."""
        try:
            (target,) = json.loads((self.folder / "prometheus" / "targets" / f"{process}.json").read_text())
            with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=5) as response:
                return str(response.read().decode())
        except (OSError, ValueError):
            return ""

    def phase(self) -> str | None:
        """Return the phase of the training loop; None while it is not served."""
        lines = self.metrics("pipeline").splitlines()
        found = [line for line in lines if line.startswith("async_rl_training_loop_phase{")]
        return found[0].partition('phase="')[2].partition('"')[0] if found else None

    def wait_for_phase(self, phase: str) -> None:
        """Wait until the training loop is in this phase, polling every few milliseconds."""
        deadline = time.monotonic() + RUN_LIMIT_S
        while self.phase() != phase:
            assert self.process.poll() is None, f"the run ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"phase {phase} did not come:\n{self.output}"
            time.sleep(0.002)

    @property
    def driver(self) -> int:
        """The pid of the driver, which is the supervisor's child."""
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
        while left := [p for p in list(self._seen.values()) if alive(p)]:
            assert time.monotonic() < deadline, f"still alive: {[(p.pid, words(p)) for p in left]}"
            time.sleep(0.2)
        assert len(self._seen) > 5, "the watcher saw no processes, so this check would prove nothing"
        assert_no_shared_memory_left(self._shm_before, self.process.pid, deadline)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._watcher.join()
        for process in self._seen.values():
            if alive(process):
                process.kill()
        self._output.close()

    def _watch(self) -> None:
        """Record every process below the run, so that one that escapes is still known."""
        supervisor = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                for process in supervisor.children(recursive=True):
                    self._seen.setdefault((process.pid, process.create_time()), process)
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.1)


def assert_no_shared_memory_left(before: set[str], pid: int, deadline: float) -> None:
    """Wait until /dev/shm has no new file but those that a process uses or that are another run's.

    before: the files that were there. pid: that of this run's supervisor.
    """
    while True:
        new = set(os.listdir("/dev/shm")) - before
        # Another run, which has had a process killed, removes its semaphores when it ends.
        new -= {name for name in new if re.match(rf"sem\.async_rl-(?!{pid}-)", name)}
        left = new - in_use(new)
        if not left:
            return
        # For a moment no process has a semaphore mapped: before its program uses it, and before its program removes it.
        assert time.monotonic() < deadline, f"left in /dev/shm: {left}"
        time.sleep(0.2)


def in_use(names: set[str]) -> set[str]:
    """Return the files in /dev/shm that a process has mapped: they belong to another run, as this one has ended."""
    inodes = {str(os.stat(f"/dev/shm/{name}").st_ino): name for name in names if os.path.exists(f"/dev/shm/{name}")}
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if inodes else ():
        try:
            # By inode: a semaphore is mapped under the temporary name that it was made with.
            mapped = {line.split()[4] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
        except OSError:
            continue
        found.update(inodes[inode] for inode in inodes.keys() & mapped)
    return found
