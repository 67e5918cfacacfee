"""Rollouts as they are written to be read, and as terminal and report show them."""

import json

import numpy as np
import pytest

from async_rl.driver import transcripts
from async_rl.observe import transcripts as shown
from async_rl.queue import codec
from async_rl.queue.records import BranchExcerpt, Excerpt
from async_rl.types import NOT_SAMPLED, Group, Prompt, RolloutRecord, Segment, Trajectory

PROMPT = Prompt("0-1", 2, "question", np.array([1, 2], np.int32))


def decode(ids):
    return "".join(chr(ord("a") + int(one) % 26) for one in ids)


def trajectory(name, prompt, response, segments, **more):
    """A trajectory whose tokens outside ``segments``, (start, stop, version), were not sampled."""
    versions = np.full(len(response), NOT_SAMPLED, np.int32)
    for start, stop, version in segments:
        versions[start:stop] = version
    return Trajectory(
        trajectory_id=name,
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(response, np.int32),
        logprobs=np.where(versions == NOT_SAMPLED, np.nan, -1.0).astype(np.float32),
        versions=versions,
        segments=tuple(Segment(*each) for each in segments),
        finish_reason="stop",
        **more,
    )


def agent():
    """The group of a rollout with a cut turn and one more, a fork of it behind its first turn, and a root."""
    first = trajectory(
        "g/0", [1, 2], [3, 4, 5, 6, 7], [(0, 1, 3), (1, 2, 4), (4, 5, 4)], origin="first", tools=("search", "add")
    )
    fork = trajectory("g/0.1", [1, 2, 3, 4, 8], [9], [(0, 1, 5)], origin="edited", tools=("search", "add"))
    root = trajectory("g/0.2", [1, 2, 3, 4], [10], [(0, 1, 5)], origin="root")
    other = trajectory("g/1", [1, 2], [3], [(0, 1, 3)], origin="first")
    return Group(
        "g",
        PROMPT,
        (
            RolloutRecord("g/0", 0.5, (first, fork, root), "truncated", {"right": 0.25}),
            RolloutRecord("g/1", 0.0, (other,)),
        ),
    )


def written(group, index=0, most=1000):
    return transcripts.sample(Excerpt.of(group, index), decode, most)


def test_a_rollout_of_an_agent_is_written_turn_by_turn_with_its_forks_and_tools():
    line = written(codec.decode(codec.encode(agent())), index=1)
    assert (line["trajectory"], line["rollout"], line["end"], line["reward"]) == ("g/0.1", "g/0", "truncated", 0.5)
    first, fork, root = line["branches"]
    assert first == {
        "trajectory": "g/0",
        "origin": "first",
        "tools": ["search", "add"],
        "prompt": "bc",
        "prompt_tokens": 2,
        "turns": [
            {
                "by": "policy",
                "segments": [
                    {"version": 3, "tokens": 1, "text": "d"},
                    {"version": 4, "tokens": 1, "text": "e"},
                ],
            },
            {"by": "context", "segments": [{"tokens": 2, "text": "fg"}]},
            {"by": "policy", "segments": [{"version": 4, "tokens": 1, "text": "h"}]},
        ],
        "finish_reason": "stop",
    }
    assert (fork["origin"], fork["forks"], fork["shared_tokens"], fork["prompt"]) == ("edited", 0, 4, "i")
    assert fork["prompt_tokens"] == 5
    assert "forks" not in root, "it only begins alike"
    assert root["prompt"] == "bcde"
    assert transcripts.tokens(line["branches"]) == {"sampled": 5, "context": 2}


def test_a_fork_is_of_the_trajectory_with_which_it_has_most_in_common():
    group = agent()
    (first, fork, _), (_,) = (rollout.trajectories for rollout in group.rollouts)
    again = trajectory("g/0.3", [1, 2, 3, 4, 8, 9, 11], [12], [(0, 1, 6)], origin="cut")
    alike = trajectory("g/0.4", [1, 2, 3, 4, 8, 11], [12], [(0, 1, 6)], origin="parallel")
    without_stop = trajectory("g/0.5", [1, 2, 3, 20, 21], [12], [(0, 1, 6)], origin="stop_mismatch")
    made = BranchExcerpt.of(RolloutRecord("g/0", 0.0, (first, fork, again, alike, without_stop)))
    assert [(each.forks, each.shared_tokens) for each in made] == [(None, 0), (0, 4), (1, 6), (0, 4), (0, 3)]
    cut = trajectory("g/0.1", [1, 2, 3, 4, 8], [9, 12], [(0, 1, 5), (1, 2, 6)], origin="parallel")
    like_its_half = trajectory("g/0.2", [1, 2, 3, 4, 8, 9, 30], [1], [(0, 1, 6)], origin="parallel")
    made = BranchExcerpt.of(RolloutRecord("g/0", 0.0, (first, cut, like_its_half)))
    assert [(each.forks, each.shared_tokens) for each in made] == [(None, 0), (0, 4), (0, 4)]


def test_turns_of_an_environment_are_written_and_one_response_only_once():
    turns = trajectory("g/0", [1, 2], [3, 4, 5], [(0, 1, 3), (2, 3, 3)])
    (branch,) = written(Group("g", PROMPT, (RolloutRecord.of(turns, 1.0),)))["branches"]
    assert [turn["by"] for turn in branch["turns"]] == ["policy", "context", "policy"]
    assert "origin" not in branch
    one = trajectory("g/0", [1, 2], [3, 4, 5], [(0, 1, 3), (1, 3, 4)])
    line = written(Group("g", PROMPT, (RolloutRecord.of(one, 1.0),)))
    assert not {"branches", "rollout"} & line.keys()


def test_text_is_bounded_however_many_tokens_there_are():
    decoded = []

    def counting(ids):
        decoded.append(len(ids))
        return decode(ids)

    text = transcripts.readable(np.arange(1_000_000, dtype=np.int32), counting, 100)
    assert len(text) < 150
    assert sum(decoded) <= 16 * 100
    assert text.startswith("abc")
    assert text.endswith(decode(range(999_950, 1_000_000)))
    cuts = [(2 * at, 2 * at + 1, 0) for at in range(300)]
    long = trajectory("g/0", [1], [1] * 599, cuts, origin="first")
    line = written(Group("g", PROMPT, (RolloutRecord("g/0", 1.0, (long,)),)), most=100)
    assert len(line["branches"][0]["turns"]) == 599
    assert all(len(turn["segments"][0]["text"]) <= transcripts.LEAST for turn in line["branches"][0]["turns"])


def test_a_terminal_shows_turns_cuts_tools_and_why_there_is_a_fork():
    text = shown.as_text(written(agent()) | {"step": 7})
    assert text.startswith("rollout g/0: step 7, reward 0.5 (right 0.25), truncated, 3 trajectories\n")
    for line in (
        "  trajectory 0: the first request; tools search, add",
        "    policy (1 tokens, version 4, resumed after a cut by a weight sync)",
        "    context (2 tokens)",
        "  trajectory 1: forks trajectory 0: the agent has edited what was said; tools search, add",
        "    prompt (5 tokens, of which the first 4 are those of what it forks)",
        "  trajectory 2: a new conversation, nothing of which was said before",
    ):
        assert f"{line}\n" in text, text


def test_a_terminal_is_not_controlled_by_what_the_model_says():
    line = {"prompt": "a", "response": "x\x1b[2Jy\rz\nnext\tcell", "segments": [], "reward_parts": {"\x1b": "\x1b"}}
    text = shown.as_text(line)
    assert "\x1b" not in text
    assert "    | x\\x1b[2Jy\\rz\n    | next\tcell\n" in text


@pytest.mark.parametrize(
    ("response", "segments", "notes"),
    [
        ("abc", [{"version": 89, "text": "ab"}, {"version": 90, "text": "c"}], ["version 89", "version 90, resumed"]),
        ("a+b", [{"version": 3, "text": "a"}, {"version": 4, "text": "b"}], ["version 3, 4"]),
        ("abc", [{"version": 5}], ["version 5"]),
        ("abc", None, [""]),
    ],
)
def test_lines_of_earlier_releases_are_shown(response, segments, notes):
    """The second has an environment's turn between its segments, of which only the response tells."""
    line = {"trajectory": "t", "prompt": "p", "response": response, "segments": segments, "finish_reason": "stop"}
    (branch,) = shown._branches(line)
    prompt, *said = branch.parts
    assert prompt.text == "p"
    assert "".join(part.text for part in said) == response
    for part, note in zip(said, notes, strict=True):
        assert part.note.startswith(note)


def test_the_report_shows_the_latest_samples_and_nothing_of_them_is_code(tmp_path):
    hostile = "</p><script>alert(1)</script>"
    lines = [{"step": step, "trajectory": f"t{step}", "response": hostile} for step in range(20)]
    odd = [
        {"branches": [3, {"turns": 3}, {"turns": [{"by": hostile, "segments": [{"text": hostile}, 4]}], "origin": []}]},
        {"branches": "no", "reward_parts": {hostile: hostile}, "tokens": 3},
        {"branches": [{"tools": "no", "forks": hostile, "finish_reason": hostile}], "reward": hostile},
        [],
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *odd]) + '{"step": '
    (tmp_path / "samples-000001.jsonl").write_text('{"step": "older"}\n')
    (tmp_path / "samples.jsonl").write_text(text)
    page = shown.in_html(tmp_path)
    assert "<script" not in page
    assert page.count("<details") == 7, "of nine lines one is being written, and one is no object"
    assert "step 19" in page
    assert "step 13" not in page
    (tmp_path / "samples.jsonl").write_text("")
    assert "step older" in shown.in_html(tmp_path), "rolled at this moment"
    assert "no samples" in shown.in_html(tmp_path / "none")
