"""The command line from outside: exit codes, what is printed where, and that nothing heavy is imported for
it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from async_rl import cli, doctor
from async_rl.config.loading import load
from async_rl.errors import TrainerError

CONFIG = "model: {path: model}\ndata: {train: train.jsonl}\ntrainer: {steps: 5}\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def pipeline(monkeypatch):
    """Stands where the real pipeline would be imported, in this process; tells what it was called with."""

    class Pipeline:
        result: object = 0
        config = resume = None

        def run(self, config, *, resume):
            self.config, self.resume = config, resume
            if isinstance(self.result, BaseException):
                raise self.result
            return self.result

    stand_in = Pipeline()
    monkeypatch.setitem(sys.modules, "async_rl.driver.run", stand_in)
    monkeypatch.setattr("async_rl.driver.run", stand_in, raising=False)
    monkeypatch.setattr("async_rl.runtime.supervisor.supervise", lambda body: body())
    return stand_in


def run(*words) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "async_rl.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_dry_run_prints_the_resolved_settings_and_starts_nothing(path, tmp_path):
    done = run("train", path, "--dry-run", "--async_training.max_staleness", "2", "--seed=7")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    resolved = load(tmp_path / "resolved.yaml")
    assert resolved == load(path, {"async_training.max_staleness": 2, "seed": 7})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "resolved.yaml"]


@pytest.mark.parametrize(
    ("verb", "read", "code"),
    [
        ("print('x' * 100_000)", False, 128 + signal.SIGPIPE),
        ("sys.stdout.write('x')", False, 128 + signal.SIGPIPE),
        ("raise BrokenPipeError('of a socket')", True, 1),
    ],
)
def test_a_reader_that_has_gone_is_no_traceback_and_another_broken_pipe_is(verb, read, code):
    program = ["import sys; from async_rl import cli", "def verb():", f"    {verb}", "    return 0"]
    command = [sys.executable, "-c", "\n".join([*program, "sys.exit(cli._reported(verb))"])]
    reader, writer = os.pipe()
    if not read:
        os.close(reader)
    with os.fdopen(writer, "w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert ("of a socket" in done.stderr) == bool(done.stderr) == read
    if read:
        os.close(reader)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "CONFIG", "--dry-run"]])
def test_help_and_dry_run_import_nothing_heavy(path, words):
    words = [str(path) if word == "CONFIG" else word for word in words]
    code = (
        "import sys; from async_rl import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'megatron', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_driver_has_what_ray_reads_when_it_is_imported_unless_the_user_has_set_it(path, pipeline):
    keepalive = "RAY_grpc_keepalive_timeout_ms"
    for given in ({}, {keepalive: "60000"}):
        with mock.patch.dict(os.environ, given):
            assert cli.main(["train", str(path)]) == 0
            assert dict(os.environ).items() >= ({"RAY_DEDUP_LOGS_SKIP_REGEX": "^", keepalive: "120000"} | given).items()
    code = "import sys; from async_rl.driver import before_ray; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "resume"), [([], False), (["--resume", "auto"], True), (["--resume=auto", "--seed", "3"], True)]
)
def test_resume_is_an_option_and_no_setting(path, pipeline, words, resume):
    assert cli.main(["train", str(path), *words]) == 0
    assert pipeline.resume is resume
    assert pipeline.config.seed == (3 if "--seed" in words else 0)


def test_resume_takes_no_other_value(path):
    done = run("train", path, "--resume", "yes")
    assert done.returncode == 2
    assert "auto" in done.stderr


def test_wrong_settings_are_one_message_and_exit_code_2(path):
    done = run("train", path, "--trainer.stpes", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("async-rl: trainer.stpes: no such setting; did you mean trainer.steps")
    assert "Traceback" not in done.stderr


def test_help_lists_every_setting_with_its_default(capsys):
    from async_rl.config.loading import leaves

    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [key for key, _ in leaves() if f"--{key}  [" not in text] == []
    assert "--async_training.max_staleness  [4]" in text
    assert "Hard bound: no token older than" in text


@pytest.mark.parametrize(
    "words",
    [
        ["train", "PATH", "--trainer.steps", "9"],
        ["train", "--trainer.steps", "9", "PATH"],
        ["train", "--trainer.steps=9", "PATH"],
    ],
)
def test_settings_may_stand_anywhere(path, pipeline, words):
    assert cli.main([str(path) if word == "PATH" else word for word in words]) == 0
    assert pipeline.config.trainer.steps == 9


def test_later_files_and_then_settings_win(path, pipeline, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("trainer: {steps: 7, groups_per_step: 3}\n")
    assert cli.main(["train", str(path), str(over), "--trainer.groups_per_step", "2"]) == 0
    trainer = pipeline.config.trainer
    assert (trainer.steps, trainer.groups_per_step) == (7, 2)
    assert cli.main(["train", str(over), "--trainer.steps", "2", str(path)]) == 0
    assert (pipeline.config.trainer.steps, pipeline.config.trainer.groups_per_step) == (2, 3)


def test_settings_that_look_like_options_of_the_command_line(path, pipeline, capsys):
    assert cli.main(["train", str(path), "--dryrun"]) == 2
    assert "dryrun: no such setting" in capsys.readouterr().err
    assert cli.main(["train", str(path), "--trainer.optimizer.lr", "-1"]) == 2
    assert "trainer.optimizer.lr: -1 is not valid" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["train"], ["fly"], ["export", "a", "b", "c"]])
def test_wrong_command_lines(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: async-rl" in capsys.readouterr().err


def test_config_file_that_is_not_there(capsys):
    assert cli.main(["train", "absent.yaml"]) == 2
    assert capsys.readouterr().err == "async-rl: config file absent.yaml: No such file or directory\n"


@pytest.mark.parametrize(
    ("result", "code", "err"),
    [
        (0, 0, ""),
        (130, 130, ""),
        (TrainerError("trainer rank 1 died"), 1, "async-rl: trainer rank 1 died\n"),
        (KeyboardInterrupt(), 130, "async-rl: interrupted\n"),
    ],
)
def test_exit_codes_of_a_run(path, pipeline, capsys, result, code, err):
    pipeline.result = result
    assert cli.main(["train", str(path)]) == code
    assert capsys.readouterr().err == err


def test_defects_keep_their_trace(path, pipeline):
    pipeline.result = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(path)])


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_doctor_exits_1_if_a_run_could_not_start(path, monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "checks", lambda config: [doctor.Check("memory", status, "1 GB", "buy more")])
    assert cli.main(["doctor", str(path)]) == code
    assert cli.main(["doctor"]) == code
    assert f"{status:<5} memory  1 GB" in capsys.readouterr().out


def test_eval_takes_a_checkpoint_beside_settings_of_checkpoints(path, monkeypatch):
    asked = []

    def evaluate(config, checkpoint, moved):
        asked.append((config.checkpoint.every, checkpoint, moved))
        return 7

    monkeypatch.setitem(sys.modules, "async_rl.driver.eval_command", mock.Mock(run=evaluate))
    monkeypatch.setattr("async_rl.runtime.supervisor.supervise", lambda body: body())
    assert cli.main(["eval", str(path), "--checkpoint", "runs/a", "--checkpoint.every", "5"]) == 7
    assert cli.main(["eval", str(path), "--checkpoint=runs/b", "--model.path", "elsewhere"]) == 7
    assert cli.main(["eval", str(path)]) == 7
    assert asked == [(5, Path("runs/a"), None), (0, Path("runs/b"), Path("elsewhere")), (0, None, None)]


def test_rollout_and_chat_take_their_options_beside_settings(path, monkeypatch):
    asked = []

    def noting(name):
        def run(config, **options):
            asked.append((name, config.rollout.n, options))
            return 7

        return mock.Mock(run=run)

    for name in ("rollout_command", "chat_command"):
        monkeypatch.setitem(sys.modules, f"async_rl.driver.{name}", noting(name))
    monkeypatch.setattr("async_rl.runtime.supervisor.supervise", lambda body: body())
    words = ["--n", "2", "--row", "5", "--json", "--rollout.n", "3", "--checkpoint", "runs/a"]
    assert cli.main(["rollout", str(path), *words]) == 7
    assert cli.main(["rollout", str(path)]) == 7
    assert cli.main(["chat", str(path), "--model.path", "elsewhere"]) == 7
    plain = {"checkpoint": None, "moved": None}
    given = {"n": 2, "row": "5", "as_json": True, "checkpoint": Path("runs/a"), "moved": None}
    assert asked == [
        ("rollout_command", 3, given),
        ("rollout_command", 8, {"n": 4, "row": None, "as_json": False, **plain}),
        ("chat_command", 8, {"checkpoint": None, "moved": Path("elsewhere")}),
    ]


@pytest.mark.parametrize(("usable", "code"), [(True, 0), (False, 1)])
def test_data_exits_1_if_a_run_would_not_take_the_rows(path, monkeypatch, capsys, usable, code):
    from async_rl.data import preview

    asked = []
    monkeypatch.setattr(preview, "preview", lambda config: (asked.append(config), ("rows\n", usable))[1])
    assert cli.main(["data", str(path), "--data.prompt_field", "question"]) == code
    assert capsys.readouterr().out == "rows\n"
    assert asked[0].data.prompt_field == "question"


def test_doctor_takes_settings_only_with_a_config(capsys):
    assert cli.main(["doctor", "--rollout.replicas", "2"]) == 2
    assert "settings need a config file" in capsys.readouterr().err
    assert cli.main(["doctor", "--cluster"]) == 2
    assert "write async-rl doctor CONFIG --cluster" in capsys.readouterr().err


@pytest.mark.parametrize(("can_start", "code"), [(True, 0), (False, 1)])
def test_doctor_of_a_cluster(path, monkeypatch, capsys, can_start, code):
    from async_rl.driver import hosts

    asked = []
    monkeypatch.setattr(hosts, "examine", lambda config: (asked.append(config), ("one line per host\n", can_start))[1])
    words = ["doctor", str(path), "--cluster", "--cluster.address", "10.0.0.1:6379"]
    assert cli.main(words) == code
    assert capsys.readouterr().out == "one line per host\n"
    assert asked[0].cluster.address == "10.0.0.1:6379"


def test_doctor_of_a_cluster_that_is_not_named(path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["doctor", str(path), "--cluster"]) == 2
    assert "no cluster is named; set cluster.address" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "checks", lambda config: [doctor.Check("memory", "ok", "1 GB")])
    assert cli.main(["doctor", str(path), "--cluster.address", "10.0.0.1:6379"]) == 0
    assert "doctor CONFIG --cluster" in capsys.readouterr().out
