"""The wire format: whatever is valid survives the trip, whatever is not is a WireError."""

import dataclasses
import struct
from pathlib import Path
from types import MappingProxyType

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.errors import WireError
from async_rl.queue.codec import SCHEMA_VERSION, decode, encode
from async_rl.queue.wire import MAX_MESSAGE_BYTES
from async_rl.types import ROLLOUT_ENDS, Group, Prompt, RolloutRecord, RoutingSpec, Segment, Trajectory
from tests.support.examples import examples
from tests.support.fuzzing import peak_bytes
from tests.support.groups import grouped

ENGINES = "", "vllm", "my:Engine"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def make_trajectory(rng, prompt_ids, cuts, spec=None, per_segment=False, name="t"):
    """A valid trajectory whose segments end at ``cuts``."""
    p, g = len(prompt_ids), cuts[-1]
    starts = [0, *cuts[:-1]]
    versions = np.repeat(np.arange(len(cuts), dtype=np.int32), np.diff([0, *cuts]))

    def routing(rows):
        shape = (rows, spec.num_moe_layers, spec.top_k)
        return rng.integers(0, spec.num_experts, shape).astype(spec.dtype)

    return Trajectory(
        trajectory_id=name,
        prompt_ids=prompt_ids,
        response_ids=rng.integers(0, 2**31 - 1, g).astype(np.int32),
        logprobs=rng.normal(size=g).astype(np.float32),
        versions=versions,
        segments=tuple(
            Segment(
                start,
                stop,
                v,
                routing(p + stop - 1) if spec and per_segment else None,
                ENGINES[per_segment * v % 3],
                (None, 0.7, 1.0)[per_segment * v % 3],
            )
            for v, (start, stop) in enumerate(zip(starts, cuts, strict=True))
        ),
        finish_reason="length",
        routed_experts=routing(p + g - 1) if spec else None,
        routing_spec=spec,
    )


@st.composite
def groups(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    prompt_ids = rng.integers(0, 1000, draw(st.integers(1, 9))).astype(np.int32)
    fields = draw(st.dictionaries(st.text(max_size=4), JSON, max_size=3))
    prompt = Prompt(draw(st.text(max_size=6)), draw(st.integers(1, 10**9)), draw(st.text()), prompt_ids, fields)
    spec = draw(
        st.none()
        | st.builds(RoutingSpec, st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 8, 256, 257, 60_000]))
    )
    trajectories = [
        make_trajectory(
            rng,
            prompt_ids,
            sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4))),
            spec,
            draw(st.booleans()),
            f"t{i}",
        )
        for i in range(draw(st.integers(1, 3)))
    ]
    rollouts, left = [], trajectories
    while left or (rollouts and draw(st.booleans())):
        count = draw(st.integers(0 if rollouts else 1, len(left)))
        rollouts.append(
            RolloutRecord(
                f"r{len(rollouts)}",
                float(rng.normal()),
                tuple(left[:count]),
                draw(st.sampled_from(ROLLOUT_ENDS)),
                draw(st.dictionaries(st.text(max_size=3), st.floats(-1, 1), max_size=2)),
                trainable=not rollouts or draw(st.booleans()),
            )
        )
        left = left[count:]
    return Group(f"{prompt.prompt_id}.0", prompt, tuple(rollouts))


def small_group(**prompt):
    rng = np.random.default_rng(0)
    prompt_ids = np.array([5, 6, 7], dtype=np.int32)
    fields = prompt.pop("fields", {"answer": "abc"})
    trajectory = make_trajectory(rng, prompt_ids, [2, 5], RoutingSpec(2, 2, 8), True, "0-1.0/0")
    rollout = RolloutRecord.of(trajectory, 0.25, {"format": 0.5})
    return Group("0-1.0", Prompt("0-1", 1, "sort cab", prompt_ids, fields), (rollout,))


def assert_same(a, b):
    """Equality by value, down to dtype and bytes of arrays."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if field.name == "fields":
                assert dict(x) == dict(y)
            else:
                assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@given(groups())
def test_invariant_1_and_3_every_group_survives_the_trip_bit_for_bit(group):
    message = encode(group)
    assert message.dtype == np.uint8
    assert_same(decode(message), group)
    assert encode(decode(message)).tobytes() == message.tobytes()  # deterministic, padding included


def test_decoded_arrays_are_aligned_read_only_views():
    message = encode(small_group())
    backing = np.zeros(len(message) + 64, dtype=np.uint8)
    shift = -backing.ctypes.data % 64
    backing[shift : shift + len(message)] = message
    buffer = backing[shift : shift + len(message)]
    trajectory = decode(buffer).trajectories[0]
    for array in (trajectory.response_ids, trajectory.routed_experts, trajectory.segments[0].routed_experts):
        assert np.shares_memory(array, buffer)
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0
    assert buffer.flags.writeable  # the caller's own array is left as it was


@pytest.mark.parametrize("as_buffer", [bytes, bytearray, lambda m: memoryview(bytes(m)), lambda m: m])
def test_decodes_from_any_bytes_like(as_buffer):
    assert_same(decode(as_buffer(encode(small_group()))), small_group())


def test_encodes_arrays_that_are_not_contiguous():
    group = small_group()
    strided = np.repeat(group.prompt.token_ids, 2)[::2]
    assert not strided.flags.c_contiguous
    prompt = dataclasses.replace(group.prompt, token_ids=strided)
    assert_same(decode(encode(dataclasses.replace(group, prompt=prompt))), group)


def test_size_is_close_to_the_sum_of_the_arrays():
    rng = np.random.default_rng(0)
    prompt_ids = np.zeros(512, dtype=np.int32)
    t = make_trajectory(rng, prompt_ids, [1536], RoutingSpec(48, 8, 128))
    arrays = sum(a.nbytes for a in (t.prompt_ids, t.response_ids, t.logprobs, t.versions, t.routed_experts))
    group = grouped("0-1.0", Prompt("0-1", 1, "", prompt_ids), [t])
    assert len(encode(group)) <= 1.01 * arrays


@pytest.mark.parametrize(
    "fields", [{"a": MappingProxyType({})}, {"a": (1, 2)}, {"a": b"x"}, {"a": {1: 2}}, {"a": 2**70}]
)
def test_fields_that_are_not_json_are_refused_by_name(fields):
    with pytest.raises(WireError, match=r"group 0-1\.0: the prompt of row 1"):
        encode(small_group(fields=fields))


def test_fields_that_nest_too_deeply_are_refused():
    nested = []
    for _ in range(2000):
        nested = [nested]
    with pytest.raises(WireError, match="row 1"):
        encode(small_group(fields={"a": nested}))


def test_lone_surrogates_of_json_text_survive():
    group = small_group(fields={"a": "\ud800"})
    assert_same(decode(encode(group)), group)


def test_oversized_is_refused_on_both_sides_before_anything_is_read():
    message = encode(small_group())
    with pytest.raises(WireError, match=f"{len(message)} bytes, more than the {len(message) - 1} allowed"):
        encode(small_group(), max_bytes=len(message) - 1)
    with pytest.raises(WireError, match="more than the"):
        decode(np.zeros(1000, dtype=np.uint8), max_bytes=999)
    assert_same(decode(message, max_bytes=len(message)), small_group())


def test_no_group_of_long_responses_is_too_large():
    tokens, routing_and_tokens = 64 * 42_000, 400  # a token of 48 layers with 8 experts, with its id and log-prob
    assert tokens * routing_and_tokens > 2**30
    assert tokens * routing_and_tokens * 100 < MAX_MESSAGE_BYTES
    assert MAX_MESSAGE_BYTES * 4 < 2**63  # what NumPy can count, in values of four bytes


# Malformed messages


def test_what_a_message_says_of_its_size_is_refused_before_memory_is_allocated():
    message = encode(small_group()).tobytes()
    length, table = bytearray(message), bytearray(message)
    struct.pack_into("<Q", length, 16, MAX_MESSAGE_BYTES)
    struct.pack_into("<I", table, 24, 2**32 - 1)
    huge = [resealed(lambda table, shape=shape: entry(table, "prompt").__setitem__(2, shape)) for shape in HUGE]

    def refused():
        for damaged in (length, table, *huge):
            with pytest.raises(WireError, match=r"truncated|states a table|bytes at offset|is not one that"):
                decode(damaged)

    assert peak_bytes(refused, 2**20) < 2**20


HUGE = ([2**38], [2**20, 2**20], [2**40, 2], [2**62, 2**62, 2**62], [0, 2**40], [0, 2**62])


def test_a_message_truncated_anywhere_is_refused():
    message = encode(small_group()).tobytes()
    for length in range(len(message)):
        with pytest.raises(WireError):
            decode(message[:length])


def test_a_message_with_bytes_behind_it_is_refused():
    with pytest.raises(WireError, match="followed by foreign bytes"):
        decode(encode(small_group()).tobytes() + b"\0")


def test_a_flipped_bit_in_any_byte_is_refused():
    message = bytearray(encode(small_group()).tobytes())
    for at in range(len(message)):
        message[at] ^= 1 << (at % 8)
        with pytest.raises(WireError):
            decode(message)
        message[at] ^= 1 << (at % 8)
    decode(message)


def test_another_schema_version_is_named():
    message = bytearray(encode(small_group()).tobytes())
    struct.pack_into("<I", message, 4, SCHEMA_VERSION + 1)
    with pytest.raises(
        WireError, match=f"schema version {SCHEMA_VERSION + 1}; this reader knows version 1 and {SCHEMA_VERSION}"
    ):
        decode(message)


def test_a_message_of_the_release_before_is_a_group_of_rollouts_of_one_trajectory():
    """Golden: as it was written while trajectories had the rewards."""
    message = (Path(__file__).parent / "golden" / "group_schema_1.bin").read_bytes()
    group = decode(message)
    (rollout,) = group.rollouts
    (trajectory,) = rollout.trajectories
    assert (rollout.rollout_id, rollout.end, rollout.trainable) == ("t", "truncated", True)
    assert (rollout.reward, list(rollout.reward_parts)) == (pytest.approx(-1.0096, abs=1e-4), ["format"])
    assert (trajectory.trajectory_id, trajectory.finish_reason) == ("t", "length")
    assert trajectory.routed_experts.shape == (7, 2, 2)
    assert [(s.start, s.stop, s.version, s.engine) for s in trajectory.segments] == [(0, 2, 0, ""), (2, 5, 1, "vllm")]
    assert_same(decode(encode(group)), group)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    with pytest.raises(WireError):
        decode(data)


@pytest.mark.parametrize("buffer", ["text", None, np.zeros((4, 4), dtype=np.uint8)[:, ::2], [1, 2]])
def test_what_is_no_buffer_is_refused(buffer):
    with pytest.raises(WireError):
        decode(buffer)


def unseal(message):
    """(table, payload bytes) of a message."""
    raw = message.tobytes()
    size = struct.unpack_from("<I", raw, 24)[0]
    return msgpack.unpackb(raw[32 : 32 + size]), raw[-(-(32 + size) // 64) * 64 :]


def seal(table, payload):
    """A message with correct length and checksum, whatever its table says."""
    packed = table if isinstance(table, bytes) else msgpack.packb(table)
    body = (packed + bytes(-(32 + len(packed)) % 64)) + payload
    checked = struct.pack("<QII", 32 + len(body), len(packed), 0) + body
    return struct.pack("<4sIQ", b"ARLG", SCHEMA_VERSION, xxhash.xxh3_64_intdigest(checked)) + checked


def resealed(change):
    table, payload = unseal(encode(small_group()))
    change(table)
    return seal(table, payload)


def test_an_array_that_belongs_to_nothing_is_refused():
    table, payload = unseal(encode(small_group()))
    payload += bytes(-len(payload) % 64)
    table["arrays"].append(["extra", "|u1", [3], len(payload)])
    with pytest.raises(WireError, match="unexpected arrays in message: extra"):
        decode(seal(table, payload + b"abc"))


def test_resealing_unchanged_is_accepted():
    assert_same(decode(resealed(lambda table: None)), small_group())


def entry(table, name):
    return next(e for e in table["arrays"] if e[0] == name)


def set_entry(name, at, value):
    return lambda table: entry(table, name).__setitem__(at, value)


def set_rollout(**values):
    return lambda table: table["rollouts"][0].update(values)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (set_entry("0.logprobs", 3, 10**9), "expected offset"),  # outside
        (set_entry("0.logprobs", 3, 0), "expected offset"),  # overlapping
        (set_entry("0.logprobs", 3, -64), "expected offset"),
        (set_entry("0.logprobs", 3, 1.5), "expected offset"),
        (set_entry("0.logprobs", 3, True), "expected offset"),
        (set_entry("0.logprobs", 1, "|O"), "dtype"),
        (set_entry("0.logprobs", 1, ">f4"), "dtype"),
        (set_entry("0.logprobs", 1, ["<f4"]), "dtype"),
        (set_entry("0.logprobs", 1, "<i4"), "logprobs must be"),
        (set_entry("0.logprobs", 2, [2**62]), "shape"),
        (set_entry("0.logprobs", 2, [0, 2**40, 2**40]), "shape"),
        (set_entry("0.logprobs", 2, [-5]), "shape"),
        (set_entry("0.logprobs", 2, [5.0]), "shape"),
        (set_entry("0.logprobs", 2, [1, 1, 1, 5]), "shape"),
        (set_entry("0.logprobs", 2, 5), "shape"),
        (set_entry("0.logprobs", 2, [4]), "4 logprobs"),
        (set_entry("0.logprobs", 0, "0.versions"), "used by an earlier array|no array"),
        (set_entry("0.logprobs", 0, ["x"]), "not a string"),
        (set_entry("0.segments", 2, [3, 2]), "segments"),
        (set_entry("0.segments", 1, "<f4"), "segments"),
        (lambda table: table["arrays"].pop(), "arrays end at"),
        (lambda table: table["arrays"].append(7), "expected \\[name"),
        (lambda table: table["arrays"].append(["extra", "|u1", [0], 2**20]), "extra"),
        (lambda table: table.pop("arrays"), "arrays is None"),
        (lambda table: table.update(row=True), "row is True"),
        (lambda table: table.update(group_id=5), "group_id is 5"),
        (lambda table: table.update(trajectories=[]), "rollout 0 has 1 trajectories, and 0 are left"),
        (lambda table: table["rollouts"].clear(), "1 of the message's 1 trajectories belong to no rollout"),
        (lambda table: table.pop("rollouts"), "rollouts is None"),
        (lambda table: table.update(rollouts=[4]), "rollout 0 is 4"),
        (set_rollout(trajectories=2), "rollout 0 has 2 trajectories, and 1 are left"),
        (set_rollout(trajectories=-1), "rollout 0 has -1"),
        (set_rollout(trainable=False), "no trajectories to train in 1 rollouts"),
        (set_rollout(trainable=1), "trainable is 1"),
        (set_rollout(end="over"), "end is 'over', not one of"),
        (set_rollout(rollout_id=None), "rollout_id is None"),
        (lambda table: table["rollouts"].append({**table["rollouts"][0], "trajectories": 0}), "twice in 0-1.0/0, "),
        (lambda table: table.update(trajectories=[3]), "trajectory 0 is 3"),
        (lambda table: table["trajectories"].append(table["trajectories"][0]), "no array 1.segments"),
        (set_rollout(reward="high"), "reward is 'high'"),
        (set_rollout(reward=float("nan")), "reward is nan"),
        (set_rollout(reward_parts={"a": "b"}), "rollout 0: the parts of its reward are {'a': 'b'}"),
        (set_rollout(reward_parts={"a": float("inf")}), "not finite numbers by name"),
        (set_rollout(metrics={"a": 1}), "rollout 0: its metrics are {'a': 1}, not finite numbers by name"),
        (set_rollout(turn_rewards=[[0]]), "rollout 0: its turn rewards are"),
        (set_rollout(turn_rewards="good"), "rollout 0: its turn rewards are"),
        (set_rollout(turn_rewards=[[0, 1.0]]), "rewards of turns {0: 1.0}"),
        (set_rollout(turns=[0, 1]), "rollout 0: its turns are \\[0, 1\\], not a list of numbers for each trajectory"),
        (set_rollout(turns=[[0], [1]]), "rollout 0-1.0/0: turns .* and rewards of turns {} for 1 traj"),
        (set_rollout(turns=[[0, 0]]), "rollout 0-1.0/0: turns "),
        (lambda table: table["trajectories"][0].update(engines=["vllm"] * 3), "engines of trajectory 0 are"),
        (lambda table: table["trajectories"][0].update(engines=[1, 2]), "engines of trajectory 0 are \\[1, 2\\]"),
        (
            lambda table: table["trajectories"][0].update(temperatures=[1.0]),
            "temperatures of trajectory 0 are \\[1.0\\]",
        ),
        (lambda table: table["trajectories"][0].update(temperatures=[1.0, 0.0]), "not a temperature for each of 2 seg"),
        (lambda table: table["trajectories"][0].update(temperatures=[1.0, "a"]), "not a temperature for each of 2 seg"),
        (lambda table: table["trajectories"][0].update(origin=3), "origin is 3"),
        (lambda table: table["trajectories"][0].update(tools=["a", 1]), "tools of trajectory 0 are"),
        (lambda table: table["trajectories"][0].update(engines="vllm"), "engines of trajectory 0 are 'vllm'"),
        (lambda table: table["trajectories"][0].update(finish_reason="abort"), "abort"),
        (lambda table: table["trajectories"][0].update(routing=None), "together"),
        (lambda table: table["trajectories"][0].update(routing=[2, 2, 0]), "routing is"),
        (lambda table: table["trajectories"][0].update(routing=[2, 2]), "routing is"),
        (lambda table: table["trajectories"][0].update(routing=[2, 2, 2]), "the model has 2 experts"),
    ],
)
def test_a_table_that_lies_is_refused_although_its_checksum_holds(change, fault):
    with pytest.raises(WireError, match=fault):
        decode(resealed(change))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",  # a byte that msgpack never uses
        b"\x80\x80",  # two values
        b"\x93\x01",  # a list that ends early
        b"\xdd\xff\xff\xff\xff",  # a list of four billion entries
        b"\x91" * 5000 + b"\x00",  # nested beyond what the parser takes
        b"\x81\x80\x01",  # a map as a key
        b"\x81\x01\x01",  # a number as a key
        b"\xa1\xff",  # a string that is no UTF-8
        b"\xc7\xff\x00",  # an extension type
        msgpack.packb([1, 2]),
    ],
)
def test_a_table_that_is_no_map_is_refused(packed):
    with pytest.raises(WireError):
        decode(seal(packed, b""))


@settings(max_examples=examples(300))
@given(st.data())
def test_a_table_changed_anywhere_and_resealed_never_raises_anything_else(data):
    message = encode(small_group())
    raw = message.tobytes()
    size = struct.unpack_from("<I", raw, 24)[0]
    packed = bytearray(raw[32 : 32 + size])
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    try:
        group = decode(seal(bytes(packed), unseal(message)[1]))
    except WireError:
        return
    assert isinstance(group, Group)  # a changed id or text is another valid message
