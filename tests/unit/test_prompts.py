"""The dataset and its cursor: bad rows are named, and no row is skipped or issued twice."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.data.cursor import DatasetCursor
from async_rl.data.dataset import BadRow, Dataset, Row, read_jsonl
from async_rl.errors import DatasetError
from async_rl.queue.broker_state import unusable_prompts
from tests.support.queue_parts import make_broker, meta


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def read(path: Path, **settings) -> Dataset:
    defaults = {"encode": encode, "prompt_field": "prompt", "max_prompt_tokens": 8, "on_bad_row": "fail"}
    return read_jsonl(path, **{**defaults, **settings})


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def dataset_of(count: int) -> Dataset:
    rows = tuple(Row(line, "p", np.array([1], np.int32), {}) for line in range(1, count + 1))
    return Dataset(Path("data.jsonl"), rows, (), "digest")


def test_a_row_becomes_a_prompt_with_its_other_fields(tmp_path):
    dataset = read(write(tmp_path / "d.jsonl", {"prompt": "ab", "answer": "ba", "level": 3}))
    prompt = DatasetCursor(dataset, shuffle=False, seed=0).next()
    assert (prompt.prompt_id, prompt.row, prompt.text) == ("0-1", 1, "ab")
    assert prompt.token_ids.tolist() == [97, 98]
    assert prompt.token_ids.dtype == np.int32
    assert dict(prompt.fields) == {"answer": "ba", "level": 3}


BAD_ROWS = {
    "{": "not JSON",
    "[1]": "expected a JSON object, got list",
    '{"question": "a"}': "no field 'prompt'",
    '{"prompt": 5}': "is int, not a string",
    '{"prompt": "  "}': "is empty",
    '{"prompt": "123456789"}': "9 tokens, more than data.max_prompt_tokens = 8",
    "": "the line is empty",
}


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS.items())
def test_a_bad_row_is_an_error_that_names_file_and_line(tmp_path, line, reason):
    path = write(tmp_path / "d.jsonl", {"prompt": "a"}, line, {"prompt": "b"})
    with pytest.raises(DatasetError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert reason in str(error.value)


def test_skipped_rows_are_counted_and_the_first_are_named(tmp_path):
    path = write(tmp_path / "d.jsonl", *BAD_ROWS, {"prompt": "good"})
    dataset = read(path, on_bad_row="skip")
    assert [row.line for row in dataset.rows] == [len(BAD_ROWS) + 1]
    assert [bad.line for bad in dataset.bad_rows] == list(range(1, len(BAD_ROWS) + 1))
    report = dataset.bad_row_report()
    assert report is not None
    assert "7 of 8 rows are bad: line 1: not JSON" in report
    assert report.endswith("and 2 more")


def test_bytes_that_are_no_utf8_are_a_bad_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DatasetError, match="line 2: not UTF-8"):
        read(path)


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n')
    assert read(path).rows[0].text == "a\u2028b"


@pytest.mark.parametrize("lines", [(), ("{", "[]")])
def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(tmp_path, lines):
    with pytest.raises(DatasetError, match=r"d\.jsonl"):
        read(write(tmp_path / "d.jsonl", *lines), on_bad_row="skip")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match="No such file"):
        read(tmp_path / "none.jsonl")


def test_first_names_the_setting_that_asks_for_too_many():
    assert [p.prompt_id for p in dataset_of(3).first(2, label="eval", key="eval.n")] == ["eval-1", "eval-2"]
    with pytest.raises(DatasetError, match=r"eval\.n asks for 4 prompts, but the file has 3"):
        dataset_of(3).first(4, label="eval", key="eval.n")


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    cursor = DatasetCursor(dataset_of(50), shuffle=True, seed=1)
    epochs = [[cursor.next().prompt_id for _ in range(50)] for _ in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == sorted(f"{number}-{line}" for line in range(1, 51))
    orders = [[prompt_id.partition("-")[2] for prompt_id in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    again = DatasetCursor(dataset_of(50), shuffle=True, seed=1)
    assert [again.next().prompt_id for _ in range(50)] == epochs[0]
    other = DatasetCursor(dataset_of(50), shuffle=True, seed=2)
    assert [other.next().prompt_id for _ in range(50)] != epochs[0]


def test_without_shuffling_rows_come_in_file_order():
    cursor = DatasetCursor(dataset_of(2), shuffle=False, seed=0)
    assert [cursor.next().prompt_id for _ in range(5)] == ["0-1", "0-2", "1-1", "1-2", "2-1"]


def test_what_was_given_back_comes_again_first_and_oldest_first():
    cursor = DatasetCursor(dataset_of(9), shuffle=False, seed=0)
    first, second = cursor.next(), cursor.next()
    cursor.give_back(second)
    cursor.give_back(first)
    assert [cursor.next().prompt_id for _ in range(3)] == ["0-2", "0-1", "0-3"]


def test_what_was_deferred_comes_again_at_the_end_of_the_epoch_and_oldest_first():
    cursor = DatasetCursor(dataset_of(4), shuffle=False, seed=0)
    first, second, third = (cursor.next() for _ in range(3))
    cursor.give_back(second, defer=True)
    cursor.give_back(first, defer=True)
    cursor.give_back(third)
    state = cursor.state()
    assert [cursor.next().prompt_id for _ in range(5)] == ["0-3", "0-4", "0-2", "0-1", "1-1"]
    cursor.restore(state)
    with pytest.raises(ValueError, match="0-2 was given back before"):
        cursor.give_back(second)
    del state["deferred"]  # as release 0.1 wrote it
    cursor.restore(state)
    assert [cursor.next().prompt_id for _ in range(3)] == ["0-3", "0-4", "1-1"]


def test_a_prompt_cannot_be_given_back_twice_or_before_it_was_handed_out():
    cursor = DatasetCursor(dataset_of(3), shuffle=False, seed=0)
    prompt = cursor.next()
    cursor.give_back(prompt)
    with pytest.raises(ValueError, match="0-1 was given back before"):
        cursor.give_back(prompt)
    for unseen in ("0-2", "1-1"):
        with pytest.raises(ValueError, match=f"{unseen} was never issued"):
            cursor.give_back(dataset_of(3).rows[0].prompt(unseen))


@given(
    rows=st.integers(1, 6),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
    moves=st.lists(st.sampled_from(["next", "train", "give_back", "defer", "restart"]), max_size=80),
    pick=st.randoms(use_true_random=False),
)
def test_invariant_5_conservation_under_give_back_and_restart(rows, shuffle, seed, moves, pick):
    """Each prompt is trained at most once and in flight at most once; what was issued is trained, in flight or back."""
    dataset = dataset_of(rows)
    cursor = DatasetCursor(dataset, shuffle=shuffle, seed=seed)
    issued, trained, in_flight = set(), set(), []
    for move in moves:
        if move == "next":
            prompt = cursor.next()
            assert prompt.prompt_id not in trained
            assert prompt.prompt_id not in [p.prompt_id for p in in_flight]
            issued.add(prompt.prompt_id)
            in_flight.append(prompt)
        elif move == "restart":
            state = json.loads(json.dumps(cursor.state()))
            cursor = DatasetCursor(dataset, shuffle=False, seed=99)
            cursor.restore(state)
            for prompt in in_flight:
                cursor.give_back(cursor.prompt(prompt.prompt_id))
            in_flight = []
        elif in_flight:
            prompt = in_flight.pop(pick.randrange(len(in_flight)))
            if move == "train":
                trained.add(prompt.prompt_id)
            else:
                cursor.give_back(prompt, defer=move == "defer")
        back = cursor.state()["returned"] + cursor.state()["deferred"]
        assert Counter([*trained, *(p.prompt_id for p in in_flight), *back]) == Counter(issued)
    # Finish the epoch that was begun: every row of every epoch so far is trained once, none is missing.
    trained.update(p.prompt_id for p in in_flight)
    while len(trained) % rows or cursor.state()["returned"] or cursor.state()["deferred"]:
        trained.add(cursor.next().prompt_id)
    epochs = len(trained) // rows
    assert trained == {f"{epoch}-{line}" for epoch in range(epochs) for line in range(1, rows + 1)}


def test_a_state_of_another_dataset_is_refused(tmp_path):
    state = DatasetCursor(dataset_of(3), shuffle=True, seed=0).state()
    with pytest.raises(DatasetError, match="contents have changed"):
        DatasetCursor(read(write(tmp_path / "d.jsonl", {"prompt": "a"})), shuffle=True, seed=0).restore(state)


def with_bad(dataset: Dataset, bad: set[int]) -> Dataset:
    """The same file, read with settings under which these lines cannot be used."""
    rows = tuple(row for row in dataset.rows if row.line not in bad)
    bad_rows = (*dataset.bad_rows, *(BadRow(row.line, "too long") for row in dataset.rows if row.line in bad))
    return Dataset(dataset.path, rows, bad_rows, dataset.digest)


@given(
    count=st.integers(2, 30),
    shuffle=st.booleans(),
    issued=st.integers(0, 60),
    back=st.integers(0, 5),
    before=st.sets(st.integers(2, 30), max_size=10),
    after=st.sets(st.integers(2, 30), max_size=10),
)
def test_invariant_5_other_settings_at_a_restore_train_no_prompt_twice_and_skip_none(
    count, shuffle, issued, back, before, after
):
    whole = dataset_of(count)
    cursor = DatasetCursor(with_bad(whole, before), shuffle=shuffle, seed=1)
    prompts = [cursor.next() for _ in range(issued)]
    for prompt in prompts[:back]:
        cursor.give_back(prompt)
    trained = [prompt.prompt_id for prompt in prompts[back:]]
    restored = DatasetCursor(with_bad(whole, after), shuffle=False, seed=2)
    restored.restore(json.loads(json.dumps(cursor.state())))
    epoch = restored.state()["epoch"]
    while (prompt := restored.next()).prompt_id.startswith((f"{epoch}-", *(f"{e}-" for e in range(epoch)))):
        trained.append(prompt.prompt_id)
    assert max(Counter(trained).values(), default=1) == 1
    for line in {row.line for row in whole.rows} - before - after:
        assert {f"{e}-{line}" for e in range(epoch + 1)} <= set(trained), "a row that is usable all along was skipped"
    assert not {int(prompt_id.partition("-")[2]) for prompt_id in trained[max(0, issued - back) :]} & after


def test_a_run_of_release_0_1_keeps_its_order_and_cannot_change_its_rows(tmp_path):
    dataset = with_bad(dataset_of(9), {2, 5})
    new, old = (DatasetCursor(dataset, shuffle=True, seed=0) for _ in range(2))
    state = new.state()
    for key in ("usable_rows", "order_of"):
        del state[key]  # as release 0.1 wrote it
    old.restore(state)
    order = [dataset.rows[at].line for at in np.random.default_rng([0, 0]).permutation(7)]
    assert [old.next().row for _ in range(7)] == order
    state = old.state()
    again = DatasetCursor(dataset, shuffle=True, seed=0)
    again.restore(state)
    assert again.next().prompt_id == old.next().prompt_id
    with pytest.raises(DatasetError, match=r"has 6 usable rows, and had 7: .* set data\.max_prompt_tokens"):
        DatasetCursor(with_bad(dataset, {1}), shuffle=True, seed=0).restore(state)


def test_what_is_outstanding_and_cannot_be_used_any_more_is_given_up():
    whole = dataset_of(9)
    broker = make_broker(DatasetCursor(whole, shuffle=False, seed=0), window_limit=9, can_rewind=True)
    tickets = broker.issue("w", 6)
    for ticket in tickets[:4]:
        broker.put(meta(ticket))
    broker.ack([group.group_id for group in broker.lease(2, "trainer")], 1)
    broker.return_group(tickets[4].group_id, "worker_lost")
    state = json.loads(json.dumps(broker.state()))
    source = DatasetCursor(with_bad(whole, {1, 3, 5, 6, 7}), shuffle=False, seed=0)
    restored = make_broker(source, window_limit=9, can_rewind=True)
    restored.restore(state)
    assert unusable_prompts(state, source) == ["0-6", "0-3", "0-5"]
    counts = restored.counts()
    assert (counts.issued, counts.trained, counts.outstanding, counts.returned, counts.failed) == (6, 2, 1, 1, 2)
    assert restored.stats().failed == {"row": 2}
    assert [ticket.prompt.prompt_id for ticket in restored.issue("w", 2)] == ["0-8", "0-9"]
    assert restored.rewind(0) == ["0-2"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_dataset_smaller_than_a_training_step_is_gone_through_again_and_again(rows):
    """Prompts of several epochs are outstanding at once, and each is one of its own."""
    source = DatasetCursor(dataset_of(rows), shuffle=True, seed=0)
    broker = make_broker(source, required_groups=8, window_limit=12, max_groups=12, max_staleness=9)
    trained = []
    for version in range(3):
        for ticket in broker.issue("w", 12):
            broker.put(meta(ticket))
        leased = broker.lease(8, "trainer")
        broker.ack([group.group_id for group in leased], version + 1)
        trained += [group.group_id for group in leased]
        broker.advance(version + 1)
    assert sorted(trained) == sorted(f"{epoch}-{row}.0" for epoch in range(24 // rows) for row in range(1, rows + 1))
    assert broker.counts().add_up


def test_a_cursor_pickles_where_it_stands(tmp_path):
    cursor = DatasetCursor(read(write(tmp_path / "d.jsonl", *[{"prompt": c} for c in "abcdef"])), shuffle=True, seed=3)
    cursor.give_back(cursor.next())
    copy = pickle.loads(pickle.dumps(cursor))
    assert [copy.next().prompt_id for _ in range(9)] == [cursor.next().prompt_id for _ in range(9)]
