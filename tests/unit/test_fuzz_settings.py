"""Settings that nobody vouches for, in a file and on the command line; see fuzzing."""

import datetime
import functools
import json
import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from async_rl.config.loading import leaves, load, parse_overrides, to_yaml
from async_rl.config.schema import RunConfig
from async_rl.errors import ConfigError
from tests.support.fuzzing import assert_readable, changed_bytes, fuzz

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
    return marked(key).replace(f"{MARKED!r}", value).replace(MARKED, value)


@functools.cache
def marked(key):
    """The text of tiny_moe with MARKED at a dotted key."""
    tree = section = yaml.safe_load(TINY_MOE)
    *sections, leaf = key.split(".")
    for name in sections:
        section = section.setdefault(name, {})
    section[leaf] = MARKED
    return yaml.safe_dump(tree, sort_keys=False, width=10**6)


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
@example("data.template_kwargs", "depth: !!binary gA==", False)
@example("reward.arguments", "{a: {1: x}, b: 2001-01-01}", True)
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


def test_a_long_number_takes_no_longer_than_a_long_word(folder):
    """YAML's plain words are told from numbers by patterns, which must not try every way to split the digits."""

    def seconds(name):
        began = time.process_time()
        assert isinstance(loaded(folder, with_value("name", name)), RunConfig)
        return time.process_time() - began

    turns = [(seconds("9" * 15_000 + "x"), seconds("x" * 15_001)) for _ in range(3)]
    assert min(number for number, _ in turns) < 5 * min(word for _, word in turns)
