"""Messages that nobody vouches for; see fuzzing."""

import copy
import struct

import msgpack
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from async_rl.errors import WireError
from async_rl.queue.codec import SCHEMA_VERSION, decode, encode
from tests.support.fuzzing import assert_readable, assert_usable, changed_bytes, fuzz, peak_bytes
from tests.unit.test_codec import groups, seal, small_group, unseal

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
    group, enough = None, 20 * len(message) + 2**20

    def decode_once():
        nonlocal group
        try:
            group = decode(message)
        except WireError as error:
            assert_readable(str(error))

    assert peak_bytes(decode_once, enough) <= enough
    return group


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
def test_a_message_changed_anywhere_and_resealed_is_refused_or_usable(data):
    message = encode(data.draw(groups())).tobytes()
    changed = bytearray(data.draw(changed_bytes(message)).ljust(32, b"\0"))
    struct.pack_into("<4sIQQ", changed, 0, b"ARLG", SCHEMA_VERSION, 0, len(changed))
    struct.pack_into("<Q", changed, 8, xxhash.xxh3_64_intdigest(bytes(changed[16:])))
    group = decoded(changed)
    if group is not None:
        assert_usable(group)


@fuzz(60)
@given(st.integers(0, 2**32 - 1) | st.integers(0, 2000))
def test_a_table_of_any_stated_length_is_refused_or_sound(table_bytes):
    checked = bytearray(encode(small_group()).tobytes()[16:])
    struct.pack_into("<I", checked, 8, table_bytes)
    preamble = struct.pack("<4sIQ", b"ARLG", SCHEMA_VERSION, xxhash.xxh3_64_intdigest(bytes(checked)))
    group = decoded(preamble + checked)
    if group is not None:
        assert_usable(group)


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
        assert_usable(group)


@fuzz(100)
@given(VALUES, st.binary(max_size=130))
def test_a_table_of_anything_at_all_is_refused(table, payload):
    assert decoded(seal(pack(table), payload)) is None


@pytest.mark.parametrize("value", sorted(RAW))
def test_what_no_packer_writes_is_refused_or_sound_at_any_place(value):
    for place in ("group_id", "row", "text", "arrays", "rollouts", "trajectories", "fields"):
        table, payload = unseal(encode(small_group()))
        table[place] = value
        group = decoded(seal(pack(table), payload))
        if group is not None:
            assert_usable(group)


@pytest.mark.parametrize("value", sorted(RAW))
def test_fields_are_refused_or_sound(value):
    """Else a group arrives that cannot be sent on, or written down."""
    table, payload = unseal(encode(small_group()))
    table["fields"] = {"a": value}
    group = decoded(seal(pack(table), payload))
    if group is not None:
        assert_usable(group)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("group_id",), "x" * 100_000),
        (("prompt_id",), "x" * 100_000),
        (("trajectories", 0, "trajectory_id"), "x" * 100_000),
        (("trajectories", 0, "finish_reason"), "x" * 100_000),
        (("rollouts", 0, "rollout_id"), "x" * 100_000),
        (("rollouts", 0, "end"), "x" * 100_000),
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
        table["rollouts"][0]["reward"] = float("nan")  # so that each of them is refused, for this if nothing else
    with pytest.raises(WireError) as refused:
        decode(seal(pack(table), payload))
    assert_readable(str(refused.value))


def test_nested_promises_of_long_lists_cost_no_more_than_a_constant():
    """The parser may allocate a list before it has seen its items; it bounds each of them, and their depth."""
    size = 100_000
    table = (b"\xdd" + struct.pack(">I", size)) * 1000
    message = seal(table + b"\xc0" * (size - len(table)), b"")

    def refused():
        with pytest.raises(WireError):
            decode(message)

    assert peak_bytes(refused, 128 * 2**20) < 128 * 2**20
