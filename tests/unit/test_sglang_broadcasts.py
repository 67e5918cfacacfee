"""What an SGLang server is asked for when the trainer broadcasts weights: groups, and one request for each pack."""

from __future__ import annotations

import pytest

from async_rl.errors import EngineError, WeightSyncError
from async_rl.rollout.engine.sglang.broadcasts import Broadcasts
from async_rl.weights.shm_file import TensorMeta

ROWS = [["a", "float32", [2]], ["b", "float32", [3]], ["c", "bfloat16", [1, 2]]]
TABLE = [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in ROWS]


class Server:
    """Records requests, and refuses those to ``refused``."""

    def __init__(self):
        self.posted, self.refused = [], ()

    async def post(self, path, body):
        self.posted.append((path, body))
        if path in self.refused:
            raise EngineError(f"{path}: refused")


def info(first, others=(), port=7000):
    """What rank 0 sends, which has the first tensors, and each of the others those after."""
    ends = [*others, len(ROWS)]
    return {
        "master_address": "10.0.0.1",
        "master_port": port,
        "rank_offset": 5,
        "world_size": 9,
        "packed_buffer_size_bytes": 8,
        "torch_backend": "nccl",
        "table": ROWS[:first],
        "others": [
            {"address": "10.0.0.2", "port": port + n, "table": ROWS[begin:end]}
            for n, (begin, end) in enumerate(zip([first, *others], ends, strict=False), start=1)
            if begin < len(ROWS)
        ],
    }


def update(rows, **more):
    names, dtypes, shapes = map(list, zip(*rows, strict=True))
    return {"names": names, "dtype_names": dtypes, "shapes": shapes, **more}


async def test_each_sender_has_a_group_and_each_pack_a_request():
    server = Server()
    broadcasts = Broadcasts(server.post)
    await broadcasts.join(info(2), TABLE)
    joined = [(body["master_address"], body["master_port"], body["group_name"]) for _, body in server.posted]
    assert joined == [("10.0.0.1", 7000, "async_rl_7000"), ("10.0.0.2", 7001, "async_rl_7001")]
    for path, body in server.posted:
        assert path == "/init_weights_update_group"
        assert (body["rank_offset"], body["world_size"], body["backend"]) == (5, 9, "nccl")
    server.posted.clear()
    await broadcasts.receive(update(ROWS[:2]))
    await broadcasts.receive(update(ROWS[2:], sender=1))
    assert {path for path, _ in server.posted} == {"/update_weights_from_distributed"}
    # A pack ends with the tensor that takes it above eight bytes.
    assert [(body["group_name"], body["names"]) for _, body in server.posted] == [
        ("async_rl_7000", ["a", "b"]),
        ("async_rl_7001", ["c"]),
    ]
    assert server.posted[1][1]["dtypes"] == ["bfloat16"]
    assert server.posted[1][1]["shapes"] == [[1, 2]]
    assert not any(body["flush_cache"] for _, body in server.posted)


async def test_earlier_groups_are_left_also_those_that_were_joined_by_halves():
    server = Server()
    server.refused = ("/init_weights_update_group", "/destroy_weights_update_group")
    broadcasts = Broadcasts(server.post)
    with pytest.raises(EngineError, match="init_weights_update_group: refused"):
        await broadcasts.join(info(2), TABLE)
    server.refused = ("/destroy_weights_update_group",)
    server.posted.clear()
    await broadcasts.join(info(3, port=8000), TABLE)
    assert [(path, body["group_name"]) for path, body in server.posted] == [
        ("/destroy_weights_update_group", "async_rl_7000"),
        ("/init_weights_update_group", "async_rl_8000"),
    ]


@pytest.mark.parametrize("rows", [ROWS[::-1], ROWS[:2], [*ROWS, ROWS[0]], [["a", "float16", [2]], *ROWS[1:]]])
async def test_other_tensors_than_those_of_the_table_are_refused_before_anything_is_received(rows):
    server = Server()
    broadcasts = Broadcasts(server.post)
    await broadcasts.join(info(3), TABLE)
    server.posted.clear()
    with pytest.raises(WeightSyncError, match="where the name table has"):
        await broadcasts.receive(update(rows))
    assert server.posted == []


async def test_nothing_is_received_before_a_connection():
    with pytest.raises(WeightSyncError, match="before init_weight_transfer_engine"):
        await Broadcasts(Server().post).receive(update(ROWS))
