"""Helpers of the fuzz tests, which feed untrusted input (messages, settings, datasets).

The package must refuse it with its own errors and nothing else: no crash, no hang, no huge allocation, no huge message,
and no input that is accepted and then cannot be used.
"""

import tracemalloc

from hypothesis import settings
from hypothesis import strategies as st

from async_rl.queue.codec import decode, encode
from async_rl.types import Group
from tests.support.examples import examples

LONGEST_LINE = 1000
"""Longest line of an error message, whatever the input is."""


def fuzz(max_examples):
    return settings(deadline=None, max_examples=examples(max_examples), derandomize=True, database=None)


def assert_readable(message):
    assert message.strip()
    for line in message.splitlines():
        assert line.strip()
        assert len(line) <= LONGEST_LINE


def peak_bytes(call, enough):
    """Return the memory that ``call`` has at its peak; the least of three if that is above ``enough``.

    What other threads of the process allocate meanwhile is counted too.
    """
    peaks = []
    while len(peaks) < 3 and (not peaks or peaks[-1] > enough):
        tracemalloc.start()
        try:
            call()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)


@st.composite
def changed_bytes(draw, original):
    """Return ``original`` after a few accidents: flips, cuts, insertions, and slices that are repeated or moved."""
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


def assert_usable(group):
    """Assert that an accepted group survives another trip; compared by bytes, because fields may be NaN."""
    assert isinstance(group, Group)
    message = encode(group)
    assert encode(decode(message)).tobytes() == message.tobytes()
