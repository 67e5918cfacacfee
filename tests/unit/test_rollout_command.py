"""``async-rl rollout`` around a scripted engine: which rows it takes, what it prints, how it fails."""

import asyncio
import json

import pytest

from async_rl.config.loading import validate
from async_rl.driver import lone_worker, rollout_command
from async_rl.errors import ConfigError, DatasetError, EngineError
from tests.support.scripted_engine import Script, ScriptedEngine
from tests.support.scripted_replica import LAYOUT

TURN = 6


class Ends(ScriptedEngine):
    """Ends each turn after six tokens; tokens of text, from 90 on, are not the policy's."""

    made = None

    def __init__(self, config, replica, cores=None):
        super().__init__(config, replica, cores, Script(layout=LAYOUT))
        self.ended, Ends.made = False, self

    def last_position(self, trajectory_id, response):
        others = [at for at, token in enumerate(response) if token >= 90]
        return (others[-1] + 1 if others else 0) + TURN - 1

    async def shutdown(self):
        self.ended = True
        await super().shutdown()


class Tokens:
    def encode(self, text, add_special_tokens=False):
        return [100 + ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(chr(one - 100) if one >= 100 else str(one) for one in ids)


class Encoder:
    tokenizer = Tokens()

    def text(self, text):
        return self.tokenizer.encode(text)


def by_row(prompt, response: str):
    return {"score": float(prompt.row), "length": float(len(response.split()))}


def ranked(prompts, completions, **_):
    return [float(at) for at, _ in enumerate(completions)]


def checks(prompt, turns):
    return "ab" if len(turns) < 3 else None


async def branches(prompt, policy, context):
    """A turn, two at one time after it, and one with another beginning."""
    first = await policy.complete(prompt.token_ids)
    said = [*prompt.token_ids, *first.token_ids]
    await asyncio.gather(*(policy.complete([*said, 190 + i]) for i in range(2)))
    await policy.complete([200])
    if prompt.row == 2:
        raise ValueError("no tool")
    return {"reward": 0.5, "seeded": 1.0}


@pytest.fixture
def made(tmp_path, monkeypatch, capsys):
    """Run the command; returns its exit code, the lines of JSON or the text that it printed, and the rest."""
    monkeypatch.setattr(lone_worker, "load_engine", lambda name: Ends)
    monkeypatch.setattr(rollout_command.reading, "encoder", lambda config: Encoder())
    monkeypatch.setattr(lone_worker.logs, "configure", lambda *_, **__: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": name}) + "\n" for name in ["a", "", "c", "d"]))

    def run(n=4, row=None, as_json=True, sources=(), **settings):
        rows = str(tmp_path / "rows.jsonl")
        data = {"sources": {name: {"path": rows} for name in sources}} if sources else {"train": rows}
        rollout = {"max_response_tokens": 40, **settings.pop("rollout", {})}
        reward = {"function": f"{__name__}:by_row"}
        tree = {"runs": str(tmp_path / "runs"), "model": {"path": str(tmp_path / "model")}, "data": data}
        config = validate({"name": "demo", **tree, "reward": reward, "rollout": rollout, **settings})
        code = rollout_command.run(config, n=n, row=row, as_json=as_json)
        assert Ends.made.ended
        assert list((tmp_path / "runs").iterdir()) == [], "no folder is left"
        said = capsys.readouterr()
        lines = [json.loads(line) for line in said.out.splitlines()] if as_json else said.out
        return code, lines, said.err

    return run


def test_the_first_usable_rows_have_one_rollout_each(made):
    code, lines, _ = made(n=2)
    assert code == 0
    assert sorted((line["row"], line["prompt"], line["reward"]) for line in lines) == [(1, "a", 1.0), (3, "c", 3.0)]
    assert all(line["reward_parts"] == {"length": 6.0} and line["end"] == "done" for line in lines)
    (branch,) = lines[0]["branches"]
    assert (branch["prompt"], branch["prompt_tokens"], branch["finish_reason"]) == (lines[0]["prompt"], 1, "stop")
    assert branch["turns"] == [
        {"by": "policy", "segments": [{"version": 0, "tokens": 6, "text": "1 2 3 4 5 0"}]}
    ]  # fmt: skip
    assert lines[0]["tokens"] == {"sampled": 6, "context": 0}
    assert lines[0]["seconds"] >= 0


def test_all_are_of_one_row_and_no_two_have_one_name(made):
    _, lines, _ = made(n=3, row="4")
    assert sorted(line["rollout"] for line in lines) == ["0-4.0/0", "0-4.1/0", "0-4.2/0"]
    assert {line["prompt"] for line in lines} == {"d"}


def test_a_reward_of_whole_groups_gets_all_rollouts_of_a_row(made):
    _, lines, _ = made(n=3, row="1", reward={"function": f"trl:{__name__}:ranked"})
    assert [line["reward"] for line in lines] == [0.0, 1.0, 2.0]


def test_sources_come_in_turn_and_a_row_names_its_source(made):
    _, lines, _ = made(n=3, sources=("x", "y"))
    assert sorted(line["rollout"] for line in lines) == ["x/0-1.0/0", "x/0-3.2/0", "y/0-1.1/0"]
    _, lines, _ = made(n=1, row="y/3", sources=("x", "y"))
    assert lines[0]["rollout"] == "y/0-3.0/0"
    with pytest.raises(ConfigError, match=r"--row 3: write x/NUMBER or y/NUMBER"):
        made(row="3", sources=("x", "y"))


def test_the_turns_of_an_environment_are_told_apart(made):
    _, text, _ = made(n=1, as_json=False, rollout={"environment": {"function": f"{__name__}:checks"}})
    assert text.splitlines()[1:] == [
        "  trajectory 0",
        "    prompt (1 tokens)",
        "    | a",
        "    policy (6 tokens, version 0)",
        "    | 1 2 3 4 5 0",
        "    context (2 tokens)",
        "    | a b",
        "    policy (6 tokens, version 0, stop)",
        "    | 9 10 11 12 13 0",
        "",
    ]
    assert text.startswith("rollout 0-1.0/0: row 1, reward 1 (length 14), done, 12 sampled tokens, 2 context tokens, ")


def test_an_agent_shows_its_branches_and_why_there_are_any(made):
    agent = {"agent": {"function": f"{__name__}:branches"}}
    code, (line,), _ = made(n=1, rollout=agent)
    assert (code, line["reward"], line["reward_parts"]) == (0, 0.5, {"seeded": 1.0})
    shown = [(b["origin"], b.get("forks"), b.get("shared_tokens"), b["prompt"]) for b in line["branches"]]
    assert shown == [("first", None, None, "a"), ("parallel", 0, 7, "["), ("root", None, None, "d")]
    assert line["tokens"] == {"sampled": 24, "context": 1}
    _, text, _ = made(n=1, rollout=agent, as_json=False)
    assert "  trajectory 1: forks trajectory 0: the agent has asked twice at one time\n" in text
    assert "    prompt (8 tokens, of which the first 7 are those of what it forks)\n    | [\n" in text


def test_a_rollout_that_fails_costs_no_other_and_says_why(made, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    code, lines, said = made(n=2, rollout={"agent": {"function": f"{__name__}:branches"}})
    assert code == 1
    (failed,) = [line for line in lines if "failed" in line]
    assert failed["failed"].endswith("prompt 0-2 (dataset row 2): raised ValueError: no tool")
    assert [line["reward"] for line in lines if "reward" in line] == [0.5]
    assert "1 of 2 rollouts failed" in said


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ("9", ConfigError, r"--row 9: data.train has the rows 1 to 4"),
        ("x", ConfigError, r"--row x: data.train has the rows 1 to 4"),
        ("s/1", ConfigError, r"--row s/1: write NUMBER"),
        ("2", DatasetError, r"data.train: line 2: field 'prompt' is empty"),
    ],
)
def test_a_row_that_cannot_be_taken_is_named(made, row, error, words):
    with pytest.raises(error, match=words):
        made(row=row)


def test_the_logs_of_an_engine_that_fails_are_kept(made, tmp_path, monkeypatch):
    async def fails(self):
        raise EngineError("no memory")

    monkeypatch.setattr(Ends, "start", fails)
    with pytest.raises(EngineError, match=r"no memory \(logs: .*/runs/demo-rollout-\w+/logs\)"):
        made()
    assert Ends.made.ended
    assert len(list((tmp_path / "runs").iterdir())) == 1
