"""Datasets in proportion: shares at every moment, each row once per epoch, and a restored run that continues."""

from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.data import reading
from async_rl.data.cursor import DatasetCursor
from async_rl.data.dataset import Dataset
from async_rl.data.mixture import Mixture, MixtureCursor
from async_rl.data.prompts import Row
from async_rl.errors import ConfigError, DatasetError
from async_rl.queue import start
from async_rl.types import source_of
from tests.support.datasets import TextEncoder
from tests.support.queue_parts import make_broker


def dataset(name, rows, digest=None, settings="s"):
    found = tuple(Row(n + 1, name, np.array([1], np.int32), {}) for n in range(rows))
    return Dataset(f"{name}.jsonl", found, (), digest or f"digest of {name}", settings=settings)


def cursor(rows, weights, seed=0, **digests):
    made = {name: dataset(name, count, digests.get(name)) for name, count in rows.items()}
    return MixtureCursor(Mixture(made, weights), shuffle=True, seed=seed)


def ids(source, count):
    return [source.next().prompt_id for _ in range(count)]


def saved(source):
    """The state as a checkpoint gives it back."""
    return msgpack.unpackb(msgpack.packb(source.state()))


MIXTURES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.integers(1, 9), st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 10.0])),
    min_size=1,
)


@given(MIXTURES, st.integers(1, 60))
@example(dict(zip("abcdef", zip([9] * 6, [3.0, 1.0, 5.0, 5.0, 1.0, 5.0], strict=True), strict=True)), 60)
def test_no_source_is_ever_a_whole_prompt_off_its_share_and_each_row_comes_once_per_epoch(mixture, count):
    rows, weights = ({name: of[n] for name, of in mixture.items()} for n in (0, 1))
    found = ids(cursor(rows, weights), count)
    total = sum(weights.values())
    for n in range(1, count + 1):
        for name, weight in weights.items():
            assert abs(sum(source_of(i) == name for i in found[:n]) - n * weight / total) < 1
    assert len(set(found)) == count
    for name, size in rows.items():
        epochs = [i.rpartition("/")[2].partition("-")[0] for i in found if source_of(i) == name]
        assert epochs == [str(n // size) for n in range(len(epochs))]


@given(MIXTURES, st.integers(0, 30), st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=5))
def test_a_restored_mixture_continues_as_one_that_was_not_interrupted(mixture, before, back):
    rows, weights = ({name: of[n] for name, of in mixture.items()} for n in (0, 1))
    source = cursor(rows, weights)
    issued = [source.next() for _ in range(before)]
    for place, defer in {place % before: defer for place, defer in back if before}.items():
        source.give_back(issued[place], defer=defer)
    restored = cursor(rows, weights, seed=9)
    restored.restore(saved(source))
    assert restored.state() == source.state()
    assert ids(restored, 40) == ids(source, 40)


def test_prompts_that_come_again_are_first_oldest_first_and_count_for_no_share():
    source = cursor({"a": 9, "b": 9}, {"a": 1, "b": 1})
    issued = [source.next() for _ in range(6)]
    for prompt in (issued[4], issued[1], issued[2]):
        source.give_back(prompt)
    again = [issued[place].prompt_id for place in (4, 1, 2)]
    assert ids(source, 3) == again
    assert [source_of(i) for i in ids(source, 4)].count("a") == 2
    with pytest.raises(ValueError, match="never issued"):
        source.give_back(cursor({"a": 9, "b": 9}, {"a": 1, "b": 1}, seed=1).prompt("a/3-1"))


def test_a_filtered_row_rests_in_its_own_source_also_over_a_restore():
    first = cursor({"a": 2, "b": 2}, {"a": 1, "b": 1})
    prompts = [first.next() for _ in range(4)]
    tired = next(prompt for prompt in prompts if source_of(prompt.prompt_id) == "a")
    first.rest(tired, 1)
    again = cursor({"a": 2, "b": 2}, {"a": 1, "b": 1})
    again.restore(saved(first))
    row = tired.prompt_id.rpartition("-")[2]
    for restored in (first, again):
        epochs = [prompt_id for prompt_id in ids(restored, 8) if prompt_id.startswith("a/")]
        assert [e for e in epochs if e.endswith(f"-{row}")] == [e for e in epochs if e == f"a/2-{row}"] != []
        assert len({e for e in epochs if e.startswith("a/1-")}) == 1


def test_sources_are_added_and_weighted_again_without_making_up_for_the_past():
    source = cursor({"a": 9, "b": 9}, {"a": 1, "b": 1})
    ids(source, 10)
    left = cursor({"a": 9, "b": 9}, {"a": 1, "b": 1})
    left.restore(saved(source))
    more = cursor({"a": 9, "b": 9, "c": 9}, {"a": 2, "b": 1, "c": 1})
    more.restore(saved(source))
    found = ids(more, 8)
    assert [[source_of(i) for i in found].count(name) for name in "abc"] == [4, 2, 2]
    of_a = [i for i in ids(left, 8) if source_of(i) == "a"]
    assert [i for i in found if source_of(i) == "a"][: len(of_a)] == of_a, "where a source was it continues"


def test_a_source_that_is_removed_gives_its_prompts_up_and_continues_if_it_comes_back():
    both, alone = ({"a": 9, "b": 9}, {"a": 1, "b": 1}), ({"a": 9}, {"a": 1})
    source = cursor(*both)
    issued = [source.next() for _ in range(8)]
    back = next(prompt for prompt in issued if source_of(prompt.prompt_id) == "b")
    source.give_back(back)
    after = cursor(*alone)
    after.restore(saved(source))
    assert {source_of(i) for i in ids(after, 4)} == {"a"}
    assert [after.usable(prompt.prompt_id) for prompt in issued] == [source_of(p.prompt_id) == "a" for p in issued]
    again = cursor(*both)
    again.restore(saved(after))
    first, *found = ids(again, 9)
    assert first == back.prompt_id
    assert {i for i in found if source_of(i) == "b"}.isdisjoint({p.prompt_id for p in issued})


def test_a_source_whose_file_has_changed_is_refused_by_name_with_the_ways_out():
    state = saved(cursor({"a": 3, "b": 3}, {"a": 1, "b": 1}))
    with pytest.raises(DatasetError, match=r"data\.sources\.b: b\.jsonl .*put the old file back.*another name"):
        cursor({"a": 3, "b": 3}, {"a": 1, "b": 1}, b="other").restore(state)


def test_one_dataset_does_not_become_sources_or_the_other_way_round():
    one, several = DatasetCursor(dataset("a", 3), shuffle=True, seed=0), cursor({"a": 3}, {"a": 1})
    with pytest.raises(DatasetError, match=r"began with data\.train.*data\.sources is set"):
        several.restore(saved(one))
    with pytest.raises(DatasetError, match=r"began with data\.sources \(a\)"):
        one.restore(saved(several))


def test_the_queue_counts_what_each_source_was_issued_and_restores_it():
    weights = ({"a": 4, "b": 4}, {"a": 3, "b": 1})
    broker = make_broker(cursor(*weights), window_limit=9)
    tickets = broker.issue("w", 8)
    assert broker.stats().issued_by_source == {"a": 6, "b": 2}
    broker.return_group(tickets[0].group_id, "worker_lost")
    assert broker.issue("w", 1)[0].group_id == f"{tickets[0].prompt.prompt_id}.1"
    other = make_broker(cursor(*weights), window_limit=9)
    other.restore(msgpack.unpackb(msgpack.packb(broker.state()), strict_map_key=False))
    assert other.stats() == broker.stats()
    plain = broker.state()
    del plain["issued_by_source"]  # as release 0.2 wrote it
    other.restore(plain)
    assert other.stats().issued_by_source == {}


def test_a_resumed_run_says_that_a_source_makes_other_prompts_and_not_that_one_is_new(monkeypatch):
    said = []
    monkeypatch.setattr(start, "log", SimpleNamespace(warning=lambda event, **_: said.append(event)))

    def broker(**settings):
        made = {name: dataset(name, 3, settings=each) for name, each in settings.items()}
        return MixtureCursor(Mixture(made, dict.fromkeys(made, 1.0)), shuffle=True, seed=0)

    before = make_broker(broker(a="s", b="s"), window_limit=9)
    before.issue("w", 4)
    for now, events in (
        ({"a": "s", "b": "s", "c": "new"}, []),
        ({"a": "other", "b": "s"}, ["data_settings_changed"]),
        ({"a": "s"}, ["prompts_given_up"]),
    ):
        said.clear()
        source = broker(**now)
        after = make_broker(source, window_limit=9)
        after.restore(before.state())
        start.report_other_prompts(before.state(), source)
        assert said == events
        assert after.counts().failed == (2 if "b" not in now else 0)


def config(**data):
    return validate({"model": {"path": "model"}, "data": data})


@pytest.fixture
def files(tmp_path):
    (tmp_path / "math.jsonl").write_text('{"question": "1+1="}\n{"question": "2+2="}\n{"question": "3+3="}\n')
    (tmp_path / "chat.jsonl").write_text('{"prompt": "hello"}\n')
    return tmp_path


def test_each_source_is_read_by_its_own_settings_over_those_of_data(files):
    settings = config(
        sources={
            "math": {"path": files / "math.jsonl", "weight": 2, "prompt_field": "question", "limit": 2},
            "chat": {"path": files / "chat.jsonl", "format": "messages", "system_prompt": "Be short."},
        }
    )
    encode = TextEncoder(lambda text: [ord(letter) for letter in text])
    found = reading.read_train(settings, lambda key: reading.read(settings, key, encode))
    assert found.weights == {"math": 2.0, "chat": 1.0}
    assert [row.text for row in found.rows] == ["1+1=", "system:Be short.;user:hello;", "2+2="]
    whole = config(sources={"math": {"path": files / "math.jsonl", "prompt_field": "question"}})
    digests = {reading.files(each, "data.sources.math.path").digest for each in (settings, whole)}
    assert len(digests) == 2, "with another limit the order is another one"
    assert found.datasets["math"].settings != found.datasets["chat"].settings


def test_a_source_without_a_usable_row_is_named_with_its_setting(files):
    settings = config(on_bad_row="skip", sources={"math": {"path": files / "math.jsonl"}})
    with pytest.raises(DatasetError, match=r"data\.sources\.math\.path: .*3 of 3 rows are bad"):
        reading.read(settings, "data.sources.math.path", TextEncoder(lambda text: [1]))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "data.train is not set"),
        ({"train": "a.jsonl", "sources": {"b": {"path": "b.jsonl"}}}, r"data.train is set beside data.sources \(b\)"),
        ({"sources": {"b": {"path": "b.jsonl", "weight": 0}}}, r"data.sources.b.weight is 0.*remove b"),
        ({"sources": {"b": {"path": "b.jsonl"}}, "eval": "b.jsonl"}, "data.eval and data.sources.b.path are the same"),
    ],
)
def test_what_cannot_be_a_mixture_is_refused(data, said):
    with pytest.raises(ConfigError, match=said):
        config(**data)
