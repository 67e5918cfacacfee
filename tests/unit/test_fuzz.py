"""Input that nobody vouches for (messages, settings, datasets) is refused with the package's own errors and nothing
else: no crash, no hang, no huge allocation, no huge message, and nothing that is accepted and then cannot be used."""

import copy
import datetime
import json
import re
import struct
import time
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
import xxhash
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_codec import groups, seal, small_group, unseal

from async_rl.config import RunConfig
from async_rl.config_file import leaves, load, parse_overrides, to_yaml
from async_rl.errors import ConfigError, DatasetError, WireError
from async_rl.queue.codec import SCHEMA_VERSION, decode, encode
from async_rl.rollout.prompts import Dataset, read_jsonl
from async_rl.types import Group, Prompt

LONGEST_LINE = 1000
"""Of an error message: whatever the input says, somebody has to read it."""


"""What the code does not do yet, by test and case (None: the whole test). Each fails until it is mended, and then has
to leave this table."""


def fuzz(max_examples):
    return settings(deadline=None, max_examples=max_examples, derandomize=True, database=None)


def assert_readable(message):
    assert message.strip()
    for line in message.splitlines():
        assert line.strip()
        assert len(line) <= LONGEST_LINE


@st.composite
def changed_bytes(draw, original):
    """``original`` after a few accidents: flips, cuts, insertions, and slices that come twice or elsewhere."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        accident = draw(st.sampled_from(["flip", "set", "truncate", "delete", "insert", "repeat", "move"]))
        if accident in ("flip", "set") and start < len(data):
            data[start] = (
                data[start] ^ 1 << draw(st.integers(0, 7)) if accident == "flip" else draw(st.integers(0, 255))
            )
        elif accident == "truncate":
            del data[stop:]
        elif accident == "delete":
            del data[start:stop]
        elif accident == "insert":
            data[start:start] = draw(st.binary(max_size=70))
        elif accident == "repeat":
            data[stop:stop] = data[start:stop]
        else:
            piece = data[start:stop]
            del data[start:stop]
            at = draw(st.integers(0, len(data)))
            data[at:at] = piece
    return bytes(data)


# The wire


# What msgpack's packer would not write. A string of the table that is one of these names is replaced by the bytes.
RAW = {f"<lists {n}>": b"\x91" * n + b"\xc0" for n in (100, 600, 1015, 1022, 3000)}
RAW |= {f"<maps {n}>": b"\x81\xa1a" * n + b"\xc0" for n in (100, 1015)}
RAW |= {
    "<four billion items>": b"\xdd\xff\xff\xff\xff",
    "<four billion pairs>": b"\xdf\xff\xff\xff\xff",
    "<four billion characters>": b"\xdb\xff\xff\xff\xff",
    "<no UTF-8>": b"\xa2\xff\xfe",
    "<unused>": b"\xc1",
    "<number as key>": b"\x81\x01\x01",
    "<bytes as key>": b"\x81\xc4\x01a\x01",
    "<same key twice>": b"\x82\xa1a\x01\xa1a\x02",
    "<long form of 1>": b"\xd3\0\0\0\0\0\0\0\1",
    "<NaN in four bytes>": b"\xca\x7f\xc0\0\1",
    "<timestamp>": b"\xd6\xff\0\0\0\1",
    "<timestamp of too many nanoseconds>": b"\xd7" + b"\xff" * 9,
    "<extension>": b"\xc7\x03\x05abc",
}
NUMBERS = st.sampled_from(
    [-(2**63), -(2**31) - 1, -64, -1, 0, 1, 2, 3, 64, 255, 256, 257, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1]
)
FLOATS = st.sampled_from([0.0, -0.0, 1.0, 1.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")])
NAMES = st.sampled_from(
    [
        *("prompt", "0.segments", "0.response_ids", "0.logprobs", "0.versions", "0.routed_experts", "0.prompt_ids"),
        *("0.segment_routing.0", "0.segment_routing.9", "1.segments", "-1.segments", "fields", "arrays", ""),
        *("<i4", "<f4", "|u1", "<u2", ">i4", "<f8", "|O", "|V0", "<U1", "<M8[ns]", "i4,f4"),
        *("stop", "length", "abort", "\ud800", "a\nb\r\0\u2028", "x" * 3000),
    ]
)
SHAPES = st.lists(NUMBERS | st.integers(0, 20), max_size=5) | st.builds(lambda: [1] * 3000)
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | FLOATS
    | NAMES
    | st.sampled_from(sorted(RAW))
    | st.binary(max_size=3)
    | st.text(max_size=5)
)
VALUES = SHAPES | st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def pack(table):
    packed = msgpack.packb(table, unicode_errors="surrogatepass")
    for name, raw in RAW.items():
        packed = packed.replace(msgpack.packb(name), raw)
    return packed


def places(value, at=()):
    """The path of everything inside ``value``."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def found(value, path):
    for key in path:
        value = value[key]
    return value


@st.composite
def changed_tables(draw, table):
    """``table`` with values of any kind at any place: replaced, removed, added, repeated, exchanged or a little off."""
    table = copy.deepcopy(table)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(table))[1:]
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        holder, key = found(table, path[:-1]), path[-1]
        value = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "repeat", "exchange", "nudge", "nudge"]))
        if change == "replace":
            holder[key] = copy.deepcopy(draw(VALUES))
        elif change == "remove":
            del holder[key]
        elif change == "add" and isinstance(value, dict):
            value[draw(NAMES | st.text(max_size=3))] = draw(VALUES)
        elif change == "add" and isinstance(value, list):
            value.insert(draw(st.integers(0, len(value))), draw(VALUES))
        elif change == "repeat" and isinstance(holder, list):
            holder.insert(draw(st.integers(0, len(holder))), copy.deepcopy(value))
        elif change == "exchange":
            other = draw(st.sampled_from(paths))
            holder[key] = copy.deepcopy(found(table, other))
        elif change == "nudge" and type(value) is int:
            holder[key] = max(
                -(2**63), min(2**64 - 1, draw(st.sampled_from([value + 1, value - 1, -value, 2 * value])))
            )
    return table


@st.composite
def changed_payloads(draw, payload):
    """Mostly as it was, so that what follows the table's checks is reached."""
    kind = draw(st.sampled_from(["same", "same", "same", "changed", "cut", "longer"]))
    if kind == "changed":
        return draw(changed_bytes(payload))
    if kind == "cut":
        return payload[: draw(st.integers(0, len(payload)))]
    return payload + bytes(draw(st.integers(1, 200)) if kind == "longer" else 0)


def decoded(message):
    """What ``decode`` makes of it, or None where it refuses; in memory and words in proportion to the message."""
    tracemalloc.start()
    try:
        group = decode(message)
    except WireError as error:
        group = None
        assert_readable(str(error))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 20 * len(message) + 2**20
    return group


def assert_sound(group):
    """A group that was accepted can be sent on, and arrives as it is; compared by bytes, for fields may hold NaN."""
    assert isinstance(group, Group)
    message = encode(group)
    assert encode(decode(message)).tobytes() == message.tobytes()


@fuzz(150)
@given(st.binary(max_size=400), st.booleans())
@example(b"", False)
def test_arbitrary_bytes_are_no_message(data, with_magic):
    assert decoded(b"ARLG" + struct.pack("<I", SCHEMA_VERSION) + data if with_magic else data) is None


@fuzz(200)
@given(st.data())
def test_a_message_that_an_accident_changed_is_refused(data):
    message = encode(data.draw(groups())).tobytes()
    changed = data.draw(changed_bytes(message))
    assert (decoded(changed) is not None) == (changed == message)


@fuzz(200)
@given(st.data())
def test_a_message_changed_anywhere_and_resealed_is_refused_or_sound(data):
    message = encode(data.draw(groups())).tobytes()
    changed = bytearray(data.draw(changed_bytes(message)).ljust(32, b"\0"))
    struct.pack_into("<4sIQQ", changed, 0, b"ARLG", SCHEMA_VERSION, 0, len(changed))
    struct.pack_into("<Q", changed, 8, xxhash.xxh3_64_intdigest(bytes(changed[16:])))
    group = decoded(changed)
    if group is not None:
        assert_sound(group)


@fuzz(60)
@given(st.integers(0, 2**32 - 1) | st.integers(0, 2000))
def test_a_table_of_any_stated_length_is_refused_or_sound(table_bytes):
    checked = bytearray(encode(small_group()).tobytes()[16:])
    struct.pack_into("<I", checked, 8, table_bytes)
    preamble = struct.pack("<4sIQ", b"ARLG", SCHEMA_VERSION, xxhash.xxh3_64_intdigest(bytes(checked)))
    group = decoded(preamble + checked)
    if group is not None:
        assert_sound(group)


@st.composite
def resealed(draw):
    """A message whose length and checksum are right, whatever the rest of it says."""
    table, payload = unseal(encode(draw(groups())))
    return seal(pack(draw(changed_tables(table))), draw(changed_payloads(payload)))


@fuzz(600)
@given(resealed())
def test_a_table_of_any_structure_is_refused_or_sound(message):
    group = decoded(message)
    if group is not None:
        assert_sound(group)


@fuzz(100)
@given(VALUES, st.binary(max_size=130))
def test_a_table_of_anything_at_all_is_refused(table, payload):
    assert decoded(seal(pack(table), payload)) is None


@pytest.mark.parametrize("value", sorted(RAW))
def test_what_no_packer_writes_is_refused_or_sound_at_any_place(value):
    for place in ("group_id", "row", "text", "arrays", "trajectories", "fields"):
        table, payload = unseal(encode(small_group()))
        table[place] = value
        group = decoded(seal(pack(table), payload))
        if group is not None:
            assert_sound(group)


@pytest.mark.parametrize("value", sorted(RAW))
def test_fields_are_refused_or_sound(value):
    """Else a group arrives that cannot be sent on, or written down."""
    table, payload = unseal(encode(small_group()))
    table["fields"] = {"a": value}
    group = decoded(seal(pack(table), payload))
    if group is not None:
        assert_sound(group)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("group_id",), "x" * 100_000),
        (("prompt_id",), "x" * 100_000),
        (("trajectories", 0, "trajectory_id"), "x" * 100_000),
        (("trajectories", 0, "finish_reason"), "x" * 100_000),
        (("trajectories", 0, "routing"), [2, 2, "x" * 100_000]),
        (("arrays", 0, 0), "x" * 100_000),
        (("arrays", 0), ["x" * 100_000, "|O", [3], 0]),
        (("arrays", 0), ["x" * 100_000, "<i4", [-3], 0]),
        (("arrays", 0), ["x" * 100_000, "<i4", [3], 1]),
        (("arrays", 0, 1), "x" * 100_000),
        (("arrays", 0, 2), [1] * 100_000),
    ],
)
def test_the_error_stays_short_however_long_the_value_is(place, value):
    table, payload = unseal(encode(small_group()))
    found(table, place[:-1])[place[-1]] = value
    if place[-1] != "finish_reason":
        table["trajectories"][0]["reward"] = float("nan")  # so that each of them is refused, for this if nothing else
    with pytest.raises(WireError) as refused:
        decode(seal(pack(table), payload))
    assert_readable(str(refused.value))


def test_nested_promises_of_long_lists_cost_no_more_than_a_constant():
    """The parser may allocate a list before it has seen its items; it bounds each of them, and their depth."""
    size = 100_000
    table = (b"\xdd" + struct.pack(">I", size)) * 1000
    message = seal(table + b"\xc0" * (size - len(table)), b"")
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 128 * 2**20


# The settings


TINY_MOE = (Path(__file__).parents[2] / "configs/tiny_moe.yaml").read_text()
KEYS = [key for key, _ in leaves()]
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS} - {""})


def laughs(levels, width=10):
    """A few hundred bytes that say a list of ``width ** levels`` items."""
    text = "&a0 [" + ", ".join(["ha"] * width) + "]"
    for level in range(1, levels):
        text = f"&a{level} [{text}" + f", *a{level - 1}" * (width - 1) + "]"
    return text


def staircase(levels):
    """Nested ``levels`` deep without a single bracket inside another: by reference."""
    return "[&s0 [x]" + "".join(f", &s{level} [*s{level - 1}]" for level in range(1, levels)) + f", *s{levels - 1}]"


# Scalars and nodes of YAML that PyYAML, or what reads its result, could stumble over.
NASTY = [
    *("", "~", "null", "true", "yes", "off", "=", "<<", "-", "?", ":", "|", ">", "%", "@", "`", "*a", "&a", "!", "!!"),
    *("0", "-1", "1_", "_", "+", "0x", "0x_", "0b_", "0o7", "08", "1:99:99", "-1:1.5", ".", "._", "1e", "1e400"),
    *(".nan", ".inf", "-.inf", "nan", "inf", "9" * 4000, "9" * 5000, "0x" + "f" * 5000, "1" + ":1" * 3000 + ".5"),
    *("2001-01-01", "2001-13-45", "2001-02-30", "0000-00-00", "2001-01-01T25:61:61", "2001-01-01T00:00:00+99:99"),
    *('"a\\nb"', '"\\0"', '"\\ud800"', '"\\u2028"', '"\\U00110000"', '"\\UFFFFFFFF"', '"\\x"', '"', "'", '""', "a\0b"),
    *("[", "]", "{", "}", "[]", "{}", "[[]]", "{a: 1}", "{a: 1, a: 2}", "{1: 2}", "{null: 1}", "{.nan: 1}", "{x}"),
    *("{[1]: 1}", "{{a: 1}: 1}", '{"": 1}', '{"a\\nb": 1}', '{"\\ud800": 1}', "{2001-01-01: 1}", "{<<: 1}", "{=: 1}"),
    *("{0x" + "f" * 5000 + ": 1}", "{" + "k" * 5000 + ": 1}", '{? "' + "k" * 5000 + '" : 1}', '{"a.b": 1, "\\n": 1}'),
    *("[" * 50, "[" * 700, "{a: " * 700, "[" * 200 + "]" * 200, "[" * 700 + "]" * 700, "- " * 700),
    *("&a [*a]", "&a {b: *a}", "&a {*a : 1}", "[&a x, *a, *a]", laughs(5), f"{{b: {laughs(5)}}}", staircase(1500)),
    *("!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!!python/tuple [1]", "!unknown x"),
    *("!!int x", "!!int ''", "!!int '-'", "!!int '0x'", "!!int [1]", "!!float x", "!!float ''", "!!float '.'"),
    *("!!bool x", "!!bool ''", "!!bool 7", "!!null x", "!!timestamp x", "!!timestamp ''", "!!str [1]", "!!str 7"),
    *("!!map [1]", "!!map x", "!!seq {}", "!!set [a]", "!!set {a}", "!!omap [a: 1]", "!!omap [1]", "!!pairs [a: 1]"),
    *("!!binary AAAA", "!!binary x", "!!binary é", "!!merge x", "!!value x", "!<tag:yaml.org,2002:int> x"),
    *("x" * 5000, '"' + "9" * 5000 + '"', "a:b", "a:b:c", "../x", "/", "é", "\x85", "\u2028", "\ufeff", "\U0001f600"),
]
MARKED = "<<here>>"


def with_value(key, value):
    """The text of tiny_moe with ``value``, as it stands, at a dotted key."""
    tree = section = yaml.safe_load(TINY_MOE)
    *sections, leaf = key.split(".")
    for name in sections:
        section = section.setdefault(name, {})
    section[leaf] = MARKED
    return yaml.safe_dump(tree, sort_keys=False, width=10**6).replace(f"{MARKED!r}", value).replace(MARKED, value)


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
    | st.binary(max_size=4)
    | st.sampled_from(["R3", "R2", "off", "exact", "in_flight", "nccl", "cpu", "linear", "gspo", "mask", "k3", "full"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.none() | st.floats(), inner, max_size=3)
        | st.dictionaries(st.sampled_from(sorted({part for key in KEYS for part in key.split(".")})), inner, max_size=3)
        | st.sets(st.integers() | st.text(max_size=3), max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def loaded(folder, content, words=()):
    """The RunConfig, or the message of the ConfigError. What is accepted can be written down and is read as it was."""
    path = folder / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        config = load(path, parse_overrides(words))
    except ConfigError as error:
        assert_readable(str(error))
        return str(error)
    assert isinstance(config, RunConfig)
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config
    return config


def names(message, key):
    """Whether ``message`` says where to look: at that key, or at a line of the file."""
    leaf = re.escape(key.rpartition(".")[2])
    return bool(re.search(rf"(?<!\w){leaf}(?!\w)", message) or re.match(r"config file \S+(:| is not YAML:) ", message))


@fuzz(100)
@given(st.binary(max_size=200) | st.text(max_size=200))
@example(b"\xff\xfea\x00:\x00")
@example("name: \ud800")
@example("a\0b: 1")
def test_arbitrary_text_is_no_config(folder, content):
    assert isinstance(loaded(folder, content), str)


@fuzz(100)
@given(st.data())
def test_a_config_that_an_accident_changed(folder, data):
    loaded(folder, data.draw(changed_bytes(TINY_MOE.encode())))


@fuzz(150)
@given(
    st.lists(
        st.sampled_from([*NASTY, *(f"{part}: " for key in KEYS for part in key.split("."))]) | st.text(max_size=4),
        max_size=6,
    ),
    st.sampled_from(["", " ", "\n", "\n  ", ", "]),
    st.sampled_from(
        ["", "x: ", TINY_MOE, TINY_MOE + "x: ", "name: &a 1\nname: *a\n", "%YAML 9.9\n---\n", "---\n---\n"]
    ),
)
def test_a_text_of_pieces_of_yaml(folder, pieces, between, before):
    loaded(folder, before + between.join(pieces))


@pytest.mark.parametrize("value", NASTY, ids=lambda value: ascii(value[:24]))
def test_a_nasty_value_at_a_key_of_every_kind(folder, value):
    keys = ["name", "seed", "runs", "prepare", "model", "data.eval", "data.shuffle", "trainer.optimizer.lr"]
    keys += ["trainer.loss.policy", "trainer.loss.dual_clip", "trainer.recompute_modules", "sync.backend"]
    for key in keys:
        result = loaded(folder, with_value(key, value))
        assert isinstance(result, RunConfig) or names(result, key)


@fuzz(200)
@given(st.sampled_from(KEYS + SECTIONS), TREES)
def test_any_tree_at_any_key(folder, key, value):
    result = loaded(folder, with_value(key, "\n" + yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()))
    assert isinstance(result, RunConfig) or names(result, key)


@fuzz(300)
@given(
    st.sampled_from(KEYS),
    st.sampled_from(NASTY) | st.text(max_size=12) | TREES.map(lambda tree: yaml.safe_dump(tree, width=10**6)),
    st.booleans(),
)
@example("seed", "2001-13-45", True)
def test_any_value_for_any_setting_on_the_command_line(folder, key, value, equals):
    result = loaded(folder, TINY_MOE, [f"--{key}={value}"] if equals else [f"--{key}", value])
    assert isinstance(result, RunConfig) or names(result, key)


@fuzz(200)
@given(
    st.lists(
        st.sampled_from([*KEYS, *SECTIONS, *NASTY]).map(lambda key: f"--{key}")
        | st.tuples(st.sampled_from([*KEYS, *SECTIONS]), st.text(max_size=6)).map(lambda pair: f"--{pair[0]}{pair[1]}")
        | st.sampled_from(["--", "---", "--=", "--.", "--..=", "-", "=", "--seed", "--seed=1", "--model.path=x=y", "7"])
        | st.text(max_size=8),
        max_size=4,
    )
)
def test_any_words_on_the_command_line(folder, words):
    loaded(folder, TINY_MOE, words)


@pytest.mark.parametrize("key", ["a\nb", "\n", "\u2028", "x" * 5000, "trainer." * 500, "trainer.steps\n", ""])
def test_an_unknown_setting_is_named_on_one_line_however_it_is_spelt(folder, key):
    for message in (
        loaded(folder, TINY_MOE, [f"--{key}=1"]),
        loaded(folder, f"{TINY_MOE}\n{json.dumps(key)}: 1\n" if len(key) < 100 else f"? {json.dumps(key)}\n: 1"),
    ):
        assert "no such setting" in message
        assert all(re.search(r": (no such setting|required)", line) for line in message.splitlines())


@pytest.mark.parametrize("value", ['"a\\0b"', '"\\ud800"'])
@pytest.mark.parametrize("key", ["runs", "model.path", "data.train"])
def test_a_path_that_no_file_can_have_is_refused(folder, key, value):
    """Else it is ValueError, not OSError, that reading or making it raises."""
    assert f"{key}: " in str(loaded(folder, with_value(key, value)))


def test_a_long_number_takes_no_longer_than_its_length(folder):
    """YAML's plain words are told from numbers by patterns, which must not try every way to split the digits."""
    began = time.perf_counter()
    assert isinstance(loaded(folder, with_value("name", "9" * 15_000 + "x")), RunConfig)
    assert time.perf_counter() - began < 1


# The dataset


def encode_text(text):
    return [ord(character) for character in text]


def read(path, on_bad_row):
    return read_jsonl(path, encode=encode_text, prompt_field="prompt", max_prompt_tokens=8, on_bad_row=on_bad_row)


def lines_of(content):
    lines = re.split(rb"\r\n|\r|\n", content)
    return lines if lines[-1] else lines[:-1]


def accounted(folder, content):
    """The dataset that is left when bad rows are skipped, None if nothing is. Every line is in it, or named."""
    path = folder / "data.jsonl"
    path.write_bytes(content)
    numbers = range(1, len(lines_of(content)) + 1)
    try:
        dataset = read(path, "skip")
    except DatasetError as error:
        message = str(error)
        assert_readable(message)
        assert (f"{len(numbers)} of {len(numbers)} rows are bad" if numbers else "is empty") in message
        with pytest.raises(DatasetError):
            read(path, "fail")
        return None
    assert isinstance(dataset, Dataset)
    assert sorted([row.line for row in dataset.rows] + [bad.line for bad in dataset.bad_rows]) == list(numbers)
    for bad in dataset.bad_rows:
        assert_readable(bad.reason)
    if not dataset.bad_rows:
        assert [row.line for row in read(path, "fail").rows] == list(numbers)
        return dataset
    with pytest.raises(DatasetError) as refused:
        read(path, "fail")
    assert f"line {dataset.bad_rows[0].line}: " in str(refused.value)
    assert_readable(str(refused.value))
    return dataset


JSON_LINES = [
    *(
        "",
        " ",
        "\t",
        "null",
        "true",
        "7",
        '"prompt"',
        "[]",
        "{}",
        "{",
        "}",
        "[" * 5000,
        '{"a":' * 5000,
        "NaN",
        "-Infinity",
    ),
    *('{"prompt": "a"}', '{"prompt": "a", "prompt": 7}', '{"prompt": null}', '{"prompt": ""}', '{"prompt": "\\u2003"}'),
    *('{"prompt": "\\u0000"}', '{"prompt": "123456789"}', '{"prompt": ["a"]}', '{"prompt": "a"}{}', '{"prompt": "a",}'),
    *('{"prompt": "a\u2028b\x85"}', '{"prompt": "\t"}', '{"prompt": "a"}\x0c', '\ufeff{"prompt": "a"}', "\ufeff", "\0"),
    *('{"prompt": "a", "x": NaN, "y": -Infinity, "z": 1e999}', '{"prompt": "a", "x": ' + "[" * 400 + "]" * 400 + "}"),
    *('{"x": "\\ud800"}', "'prompt'", "# prompt", '{"prompt"}', '{"\\ud800": 1, "prompt": "a"}', '{"PROMPT": "a"}'),
    *("9" * 5000, '{"prompt": "a", "x": ' + "9" * 5000 + "}", '{"prompt": "a", "x": 1' + "0" * 30 + "}"),
    *('{"a\\nb": 1}', '{"' + "k" * 5000 + '": 1}', json.dumps({str(n): n for n in range(2000)})),
]
JSON_TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("prompt"), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = (
    st.sampled_from(JSON_LINES)
    | JSON_TREES.map(json.dumps)
    | st.tuples(st.text(max_size=9), JSON_TREES).map(lambda row: json.dumps({"prompt": row[0], "x": row[1]}))
    | st.tuples(st.text(max_size=9), JSON_TREES).map(
        lambda row: json.dumps({"prompt": row[0], "x": row[1]}, ensure_ascii=False)
    )
    | st.text(max_size=12)
)
FILES = st.builds(
    lambda bom, lines, end, last: bom + end.join(lines) + last,
    st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    st.lists(LINES.map(lambda line: line.encode("utf-8", "surrogatepass")) | st.binary(max_size=12), max_size=6),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]),
    st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]),
)


@fuzz(150)
@given(st.binary(max_size=300))
@example(b"")
@example(b"\r\n\r\r\n")
def test_arbitrary_bytes_are_no_dataset(folder, content):
    assert accounted(folder, content) is None


@fuzz(400)
@given(FILES)
@example(b"9" * 5000)
def test_every_line_of_any_file_is_a_row_or_named(folder, content):
    accounted(folder, content)


@fuzz(150)
@given(st.data())
def test_a_dataset_that_an_accident_changed(folder, data):
    good = b'{"prompt": "ab", "answer": "b\\u00e9", "level": [1, 2.5, null]}\n' * 3
    accounted(folder, data.draw(changed_bytes(good)))


@pytest.mark.parametrize("line", JSON_LINES, ids=lambda line: ascii(line[:24]))
def test_a_line_of_every_kind_is_accounted_for(folder, line):
    accounted(folder, f'{{"prompt": "a"}}\n{line}\n{line}'.encode("utf-8", "surrogatepass"))
    accounted(folder, line.encode("utf-8", "surrogatepass"))


@fuzz(200)
@given(st.lists(LINES, min_size=1, max_size=4))
@example(['{"prompt": "a", "x": 1' + "0" * 30 + "}"])
@example(['{"prompt": "\\ud800"}'])
@example(['{"prompt": "a", "x": ' + "[" * 400 + "]" * 400 + "}"])
def test_a_row_that_is_accepted_can_be_encoded_and_carried(folder, lines):
    """Else the run ends when that row's turn comes."""
    dataset = accounted(folder, "\n".join(lines).encode("utf-8", "surrogatepass"))
    for row in dataset.rows if dataset else ():
        row.text.encode()  # what every tokenizer does first
        prompt = row.prompt("0-1")
        assert isinstance(prompt, Prompt)
        assert prompt.token_ids.dtype == np.int32
        group = small_group()
        assert_sound(Group("0-1.0", prompt, group.trajectories))
