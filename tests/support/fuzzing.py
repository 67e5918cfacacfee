"""What the fuzz tests share. Input that nobody vouches for (messages, settings, datasets) is refused with the package's
own errors and nothing else: no crash, no hang, no huge allocation, no huge message, and nothing that is accepted and
then cannot be used."""

from hypothesis import settings
from hypothesis import strategies as st

from async_rl.queue.codec import decode, encode
from async_rl.types import Group

LONGEST_LINE = 1000
"""Of an error message: whatever the input says, somebody has to read it."""


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


def assert_sound(group):
    """A group that was accepted can be sent on, and arrives as it is; compared by bytes, for fields may hold NaN."""
    assert isinstance(group, Group)
    message = encode(group)
    assert encode(decode(message)).tobytes() == message.tobytes()
