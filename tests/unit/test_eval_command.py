"""``async-rl eval`` around a scripted engine: which model it takes, what it writes and prints, how it ends."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from async_rl.config.loading import validate
from async_rl.driver import eval_command
from async_rl.driver.eval_command import find_source, table
from async_rl.errors import CheckpointError, ConfigError, EngineError, RewardError
from async_rl.runtime.interrupt import Interrupted
from tests.support.scripted_engine import Script, ScriptedEngine
from tests.support.scripted_replica import LAYOUT
from tests.support.step_records import eval_results


class Ends(ScriptedEngine):
    """Responses of 12 tokens. Notes what it was made with, and whether it was ended."""

    made = None

    def __init__(self, config, replica, cores=None):
        super().__init__(config, replica, cores, Script(length=12, layout=LAYOUT))
        self.ended, Ends.made = False, self

    async def shutdown(self):
        self.ended = True
        await super().shutdown()


class Tokens:
    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


class Encoder:
    tokenizer = Tokens()
    prints_date = False

    def text(self, text):
        return list(text.encode())


def half(prompt, response: str) -> float:
    """Return 1 for every other row."""
    return float(prompt.row % 2)


def refuses(prompt, response: str) -> None:
    """Apply to no response."""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A config with two sets, and a model; what a run would load is scripted."""
    monkeypatch.setattr(eval_command, "load_engine", lambda name: Ends)
    monkeypatch.setattr(eval_command.reading, "encoder", lambda config: Encoder())
    monkeypatch.setattr(eval_command.logs, "configure", lambda *_, **__: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    rows = [{"prompt": name, "data_source": "xy"[number // 2]} for number, name in enumerate("abcd")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**settings):
        return validate(
            {
                "name": "demo",
                "runs": str(tmp_path / "runs"),
                "model": {"path": str(tmp_path / "model")},
                "data": {"train": "train.jsonl", "eval": str(tmp_path / "rows.jsonl")},
                "eval": {"n": 3, "sets": {"mine": {"path": str(tmp_path / "rows.jsonl"), "k": 2}}},
                "reward": {"function": f"{__name__}:half"},
                "rollout": {"max_response_tokens": 40},
                **settings,
            }
        )

    return make


def test_every_set_is_evaluated_printed_and_written(given, tmp_path, capsys):
    assert eval_command.run(given(), None) == 0
    shown, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    result = json.loads(last)
    mine = result["sets"]["mine"]
    assert (mine["problems"], mine["k"], mine["avg"]["mean"], mine["pass"]["2"]["mean"]) == (4, 2, 0.5, 0.5)
    assert result["sets"]["held_out"]["avg"]["mean"] == pytest.approx(2 / 3)
    assert (mine["truncated"], mine["response_tokens_mean"], list(mine["sources"])) == (0.0, 12.0, ["x", "y"])
    assert result["checkpoint"] == str(tmp_path / "model")
    folder = tmp_path / "runs" / "demo-eval"
    assert result["folder"] == str(folder)
    written = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    assert {line["set"]: line for line in written} == result["sets"]
    samples = [json.loads(line) for line in (folder / "eval_samples.jsonl").read_text().splitlines()]
    assert [(line["set"], line["prompt"]) for line in samples] == [
        ("held_out", "a"), ("held_out", "b"), ("mine", "a"), ("mine", "b"),
    ]  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == result
    assert shown.splitlines()[0].split() == ["set", "problems", "k", "avg@k", "pass@k", "cut", "off", "tokens"]
    assert Ends.made.ended
    assert Ends.made.routing_spec is None, "routed experts are for training"


def test_a_checkpoint_that_is_no_hugging_face_folder_is_exported_for_the_evaluation(given, tmp_path, monkeypatch):
    step, asked = tmp_path / "step-000020", []

    def export(command, **_):
        asked.append(command[1:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(eval_command, "find", lambda path: step)
    monkeypatch.setattr(eval_command, "subprocess", SimpleNamespace(run=export))
    assert eval_command.run(given(), step, tmp_path / "model") == 0
    (command,) = asked
    made = command[4]
    assert command == ["-m", "async_rl.cli", "export", str(step), made, "--model.path", str(tmp_path / "model")]
    assert Ends.made._config.model.path.name == made.rpartition("/")[2]
    assert not Ends.made._config.model.path.exists(), "it is removed"


def test_an_export_that_fails_says_why(given, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nasync-rl: no such folder; say where: --model.path FOLDER\n")
    monkeypatch.setattr(eval_command, "find", lambda path: tmp_path / "step-000020")
    monkeypatch.setattr(eval_command, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(
        CheckpointError, match=r"step-000020 cannot be exported, exit code 1: no such folder; say where"
    ):
        eval_command.run(given(), tmp_path / "step-000020")


def test_a_run_folder_stands_for_its_final_model(tmp_path):
    final = tmp_path / "run" / "checkpoints" / "final"
    with pytest.raises(
        CheckpointError, match=r"--checkpoint .*run is no Hugging Face folder with a config.json: .*neither"
    ):
        find_source(tmp_path / "run")
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    for named in (tmp_path / "run", final.parent, final):
        assert find_source(named) == eval_command.Source(final, exported=True)


def test_without_a_set_there_is_nothing_to_do(given):
    with pytest.raises(ConfigError, match=r"set data.eval, or eval.sets.NAME.path"):
        eval_command.run(given(eval={}, data={"train": "train.jsonl"}), None)


@pytest.mark.parametrize("fault", ["reward", "engine", "interrupt"])
def test_the_engine_is_ended_however_the_evaluation_ends(given, monkeypatch, fault):
    config = given(reward={"function": f"{__name__}:refuses"})
    if fault == "reward":
        with pytest.raises(RewardError, match="each of 7 evaluation problems failed"):
            eval_command.run(config, None)
    else:

        async def fails(self):
            raise EngineError("no memory") if fault == "engine" else Interrupted

        monkeypatch.setattr(Ends, "start", fails)
        if fault == "engine":
            with pytest.raises(EngineError, match=r"no memory \(logs: .*demo-eval/logs\)"):
                eval_command.run(config, None)
        else:
            assert eval_command.run(config, None) == 130
    assert Ends.made.ended


def test_the_table_shows_half_of_the_interval():
    line = eval_results(0.5, "aime", problems=1) | {"failed": 2}
    assert table({"aime": line}).splitlines()[1].split() == [
        "aime", "1", "(2", "failed)", "4", "0.500", "@1", "0.250", "25.0%", "30",
    ]  # fmt: skip
    avg = {"mean": 0.5, "stderr": 0.1, "low": 0.304, "high": 0.696}
    assert "0.500 ± 0.196" in table({"aime": line | {"avg": avg}})
