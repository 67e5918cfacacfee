"""Who logs where: ours to <role>.jsonl and the console, everybody else to <role>.libs.log only."""

import json
import logging
import warnings

import pytest
import structlog

from async_rl.runtime import logs


@pytest.fixture(autouse=True)
def _restored():
    """Logging is global: put back what was there."""
    ours, root = logging.getLogger("async_rl"), logging.getLogger()
    kept = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in (ours, root)]
    for logger in (ours, root):
        logger.handlers.clear()
    yield
    logging.captureWarnings(False)
    for logger, handlers, level, propagate in kept:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
    structlog.reset_defaults()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ours_are_json_lines_with_their_role(tmp_path, capsys):
    logs.configure(tmp_path, "rollout-0", console=False)
    structlog.get_logger("async_rl.rollout").info("pushed", version=3, canary=float("nan"))
    logging.getLogger("async_rl.queue").warning("plain %s", "call")
    first, second = read(tmp_path / "logs" / "rollout-0.jsonl")
    assert first["event"] == "pushed"
    assert (first["role"], first["version"], first["canary"]) == ("rollout-0", 3, None)
    assert (first["level"], first["logger"]) == ("info", "async_rl.rollout")
    assert (second["event"], second["level"], second["role"]) == ("plain call", "warning", "rollout-0")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_lines_say_of_which_run_and_version_they_are(tmp_path):
    logs.configure(tmp_path / "demo", "trainer-0", console=False)
    logs.bind(version=7)
    structlog.get_logger("async_rl.trainer").info("ours")
    logging.getLogger("async_rl.trainer").info("plain")
    logs.configure(tmp_path / "demo", "trainer-1", console=False)
    structlog.get_logger("async_rl.trainer").info("another process")
    lines = read(tmp_path / "demo" / "logs" / "trainer-0.jsonl")
    assert [(line["run"], line["role"], line["version"]) for line in lines] == [("demo", "trainer-0", 7)] * 2
    (line,) = read(tmp_path / "demo" / "logs" / "trainer-1.jsonl")
    assert "version" not in line


def test_console_gets_our_warnings_only(tmp_path, capsys):
    chatty = logging.getLogger("vllm")
    chatty.addHandler(logging.StreamHandler())
    chatty.propagate = False
    logs.configure(tmp_path, "pipeline", console=True)
    structlog.get_logger("async_rl.x").info("quiet")
    structlog.get_logger("async_rl.x").warning("mine", a=1)
    logging.getLogger("vllm.engine").info("theirs")
    logging.getLogger("ray").warning("theirs too")
    warnings.warn("and this", stacklevel=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "event=mine" in captured.err
    assert "a=1" in captured.err
    assert "quiet" not in captured.err
    assert "their" not in captured.err
    text = (tmp_path / "logs" / "pipeline.libs.log").read_text()
    assert "INFO vllm.engine: theirs" in text
    assert "theirs too" in text
    assert "and this" in text
    assert [line["event"] for line in read(tmp_path / "logs" / "pipeline.jsonl")] == ["quiet", "mine"]


def test_exceptions_are_kept_whole(tmp_path):
    logs.configure(tmp_path, "trainer-0", console=False)
    try:
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger("async_rl.trainer").exception("step failed")
    (line,) = read(tmp_path / "logs" / "trainer-0.jsonl")
    assert "ValueError: boom" in line["exception"]


def test_the_last_call_counts(tmp_path):
    logs.configure(tmp_path, "a", console=False)
    logs.configure(tmp_path, "b", console=False)
    structlog.get_logger("async_rl").info("once")
    assert not (tmp_path / "logs" / "a.jsonl").exists()
    assert len(read(tmp_path / "logs" / "b.jsonl")) == 1


def test_without_a_run_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logs.configure(None, "tool", console=False)
    structlog.get_logger("async_rl").info("nobody hears")
    logging.getLogger("other").error("nor this")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_logs_are_rotated_by_size_and_lose_their_oldest_lines_only(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 2_000)
    logs.configure(tmp_path, "rollout-0", console=False)
    for number in range(200):
        structlog.get_logger("async_rl.rollout").info("pushed", number=number, text="\ud800")
        logging.getLogger("vllm").warning("number %d", number)
    folder = tmp_path / "logs"
    ours = logs.files(folder / "rollout-0.jsonl")
    assert [path.name for path in ours] == [*(f"rollout-0.{n}.jsonl" for n in (3, 2, 1)), "rollout-0.jsonl"]
    numbers = [line["number"] for path in ours for line in read(path)]
    assert numbers == list(range(numbers[0], 200))
    assert (folder / "rollout-0.libs.3.log").exists()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * 4 * 2_000
