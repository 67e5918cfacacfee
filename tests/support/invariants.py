"""What must hold of a run, whatever was killed in it: checked from its files alone."""

import functools
import json

from async_rl.config.loading import load
from async_rl.data.cursor import DatasetCursor
from async_rl.queue.actor import QueueActor
from async_rl.queue.journal import FileJournal
from async_rl.queue.start import build_broker
from tests.support.datasets import read_files


def check(run, tmp_path, journal=None, *, scripted=False) -> None:
    """Conservation by id (5), the hard bound (4) and the books, of a run that came to an orderly end.

    journal: opens the queue's, where it is not in the run folder. scripted: the engine's log-probs are its script's.
    """
    config = load(run.folder / "config.yaml")
    groups = [group for row in run.trained for group in row["groups"]]
    assert [row["step"] for row in run.trained] == list(range(1, len(run.trained) + 1)), (
        "a step is missing, or is twice"
    )
    assert [row["step"] for row in run.rows] == [row["step"] for row in run.trained]
    assert all(len(row["groups"]) == config.required_groups for row in run.trained)
    trained = [group.rpartition(".")[0] for group in groups]
    assert len(set(trained)) == len(trained), "a prompt was trained twice"

    if journal is None:
        copy = tmp_path / "journal"
        copy.write_bytes((run.folder / "queue.journal").read_bytes())
        journal = functools.partial(FileJournal, copy)
    state = rebuilt(config, journal)
    outstanding = [fields[1] for fields in state["running"]]
    outstanding += [fields[1] for fields, _ in state["queued"] + state["leased"]]
    circulating = state["source"]["returned"] + state["source"]["deferred"]
    given_up = sum(state["failed"].values()) + sum(state["filtered"].values())
    assert state["trained"] == len(trained)
    assert state["issued"] == len(trained) + len(outstanding) + sum(state["returned"].values()) + given_up
    everywhere = trained + outstanding + circulating
    assert len(set(everywhere)) == len(everywhere), "a prompt is in two places"
    issued = prompts_issued(config, state["source"])
    assert set(everywhere) <= issued
    nowhere = sorted(issued - set(everywhere))[:5]
    assert len(issued) == len(everywhere) + given_up, f"prompts that are nowhere: {nowhere}"

    bound = config.async_training.max_staleness
    for name in ("metrics.jsonl", "rewound-metrics.jsonl"):
        path = run.folder / name
        for line in path.read_text().splitlines() if path.exists() else ():
            ages = [int(age) for age, tokens in json.loads(line)["token_staleness"].items() if tokens]
            assert max(ages, default=0) <= bound, "a token over the bound was trained"
    if scripted:
        return
    # In mode in_flight a token of the new version rests on activations of the old one: weights apart by a step.
    limit = 1e-2 if config.async_training.partial_rollout.mode == "in_flight" else 1e-4
    worst = max(row["on_policy_logprob_abs_diff_max"] or 0.0 for row in run.rows)
    print(f"{len(run.rows)} steps; on-policy log-probs differ by {worst:.1e} at most")
    assert worst <= limit, "engine and trainer disagree on tokens of staleness 0: wrong weights or stamps"


def conserved(groups) -> bool:
    """Whether the counts of a summary add up (5)."""
    ends = ("trained", "outstanding", "returned", "failed", "filtered")
    return groups["issued"] == sum(groups[end] for end in ends)


def rebuilt(config, journal) -> dict:
    """The broker's last state, from what the queue wrote down."""
    cursor = DatasetCursor(dataset(config), shuffle=config.data.shuffle, seed=config.seed)
    return QueueActor(build_broker(config, cursor), journal)._broker.state()


def dataset(config):
    return read_files(
        config.data.train,
        encode=lambda text: list(text.encode()),
        prompt_field=config.data.prompt_field,
        max_prompt_tokens=config.data.max_prompt_tokens,
        on_bad_row=config.data.on_bad_row,
    )


def prompts_issued(config, source) -> set[str]:
    """Every prompt that the cursor has passed."""
    cursor = DatasetCursor(dataset(config), shuffle=config.data.shuffle, seed=config.seed)
    passed = set()
    while (state := cursor.state())["epoch"] < source["epoch"] or state["index"] < source["index"]:
        passed.add(cursor.next().prompt_id)
    return passed
