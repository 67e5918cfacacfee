"""Rows reach the loggers that people use, read back with their own readers; and none of them can end a run."""

import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import structlog.testing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from async_rl.errors import ConfigError
from async_rl.metrics import loggers as loggers_module
from async_rl.metrics.loggers import Loggers, open_loggers, scalars
from async_rl.metrics.publish import step_row
from tests.support.step_records import step_record

ROWS = [step_row(step_record(step=step, time=1.8e9 + step, reward_mean=step / 10)) for step in (1, 2, 3)]


def test_rows_become_flat_numbers():
    flat = dict(scalars(ROWS[0]))
    assert flat["reward_mean"] == 0.1
    assert flat["ppo_kl_by_staleness/2"] == 0.01
    assert "eval_reward_mean" not in flat  # None
    assert dict(scalars({"exit_reason": "finished", "ok": True, "n": 3})) == {"n": 3.0}


def test_tensorboard_has_every_number_of_every_step(tmp_path):
    loggers = open_loggers(["tensorboard"], tmp_path, {})
    for row in ROWS:
        loggers.step(row)
    loggers.finish({"steps": 3})
    loggers.close()
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {tag for tag, _ in scalars(ROWS[0])}
    read = [(event.step, event.wall_time, event.value) for event in events.Scalars("reward_mean")]
    assert read == [(row["step"], row["time"], pytest.approx(row["reward_mean"])) for row in ROWS]


def test_tensorboard_shows_steps_that_were_made_again_once(tmp_path):
    """A run that went back to its checkpoint of step 1, gone on with by another process or by the same one."""
    one = open_loggers(["tensorboard"], tmp_path, {})
    for row in ROWS:
        one.step(row)
    one.close()
    time.sleep(1.1)  # event files are ordered by the second in their names
    other = open_loggers(["tensorboard"], tmp_path, {})
    for step, value in ((2, 0.5), (3, 0.6), (3, 0.7)):
        other.step({"step": step, "time": 1.9e9, "reward_mean": value})
    other.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("reward_mean")]
    assert read == [(1, pytest.approx(0.1)), (2, pytest.approx(0.5)), (3, pytest.approx(0.7))]


def test_tensorboard_does_without_torch(tmp_path):
    program = f"""
import sys; from pathlib import Path; from async_rl.metrics.loggers import open_loggers
open_loggers(["tensorboard"], Path({str(tmp_path)!r}), {{}}).close()
sys.exit("torch" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=False).returncode == 0


def stored(data):
    """The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB, of pieces with checksum, length, type."""
    position, pieces = 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last
            yield pieces
            pieces = b""


def alive(marker):
    """Processes that have the environment variable ``marker``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


# In a process of its own: wandb starts another one, and both are to be gone.
OFFLINE = """
import sys; from pathlib import Path; from tests.support.step_records import step_record
from async_rl.metrics.loggers import open_loggers
from async_rl.metrics.publish import step_row
loggers = open_loggers(["wandb"], Path(sys.argv[1]), {"seed": 5})
for step in (1, 2, 3):
    loggers.step(step_row(step_record(step=step, time=1.8e9 + step, reward_mean=step / 10)))
loggers.finish({"steps": 3})
loggers.close()
"""


def test_wandb_has_every_step_without_a_network(tmp_path):
    from wandb.proto import wandb_internal_pb2

    marker = f"TEST_OF_LOGGERS={tmp_path}"
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= dict([marker.split("=")])
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout + ran.stderr == ""  # the terminal is the live view's
    deadline = time.monotonic() + 10
    while alive(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(marker) == []
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = [wandb_internal_pb2.Record.FromString(data) for data in stored(file.read_bytes())]
    assert [record.run.display_name for record in records if record.WhichOneof("record_type") == "run"] == [
        tmp_path.name
    ]
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    values = [{(item.key or "/".join(item.nested_key)): item.value_json for item in one.item} for one in history]
    assert [float(one["reward_mean"]) for one in values] == [0.1, 0.2, 0.3]
    assert float(values[0]["ppo_kl_by_staleness/2"]) == 0.01


class Broken:
    closed = 0

    def step(self, row):
        raise RuntimeError("disk full")

    def finish(self, summary):
        raise AssertionError("it was dropped")

    def close(self):
        self.closed += 1
        raise RuntimeError("disk still full")


class Sound:
    def __init__(self):
        self.heard = []

    def step(self, row):
        self.heard.append(row["step"])

    def finish(self, summary):
        self.heard.append("finish")

    def close(self):
        self.heard.append("close")


def test_a_logger_that_fails_is_dropped_with_one_warning_and_the_others_go_on():
    sound = Sound()
    broken = Broken()
    loggers = Loggers({"broken": broken, "sound": sound})
    with structlog.testing.capture_logs() as logs:
        for row in ROWS:
            loggers.step(row)
        loggers.finish({})
        assert broken.closed == 0  # that may take its time
        loggers.close()
    assert broken.closed == 1  # what it took before it failed is written
    assert sound.heard == [1, 2, 3, "finish", "close"]
    assert [(line["logger_name"], line["log_level"]) for line in logs] == [("broken", "warning")]
    assert "disk full" in logs[0]["reason"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_with_the_setting(name, tmp_path, monkeypatch):
    for module in [key for key in sys.modules if key.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"metrics\.loggers: {name} is not installed .* pip install {name}"):
        open_loggers([name], tmp_path, {})


def test_a_logger_that_does_not_start_is_named_with_the_mend_and_those_before_it_are_closed(tmp_path, monkeypatch):
    def refused(*_):
        raise RuntimeError("No API key configured")

    monkeypatch.setattr(loggers_module, "WeightsAndBiases", refused)
    before = threading.active_count()
    with pytest.raises(
        ConfigError, match=r"metrics\.loggers: wandb does not start .No API key.*; .*WANDB_MODE=offline"
    ):
        open_loggers(["tensorboard", "wandb"], tmp_path, {})
    assert threading.active_count() == before


def test_off_by_default(tmp_path):
    open_loggers([], tmp_path, {}).step(ROWS[0])
    assert list(tmp_path.iterdir()) == []
