"""The weight file: what is written is read, and nothing else is. No engine."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from async_rl.errors import WeightSyncError
from async_rl.weights.shm_file import HEAD, TensorMeta, WeightFile, read


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 5, generator=generator),
        "layers.0.norm.weight": torch.randn(5, generator=generator).bfloat16(),
        "layers.0.experts.0.w": torch.randn(3, 1, 2, generator=generator),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(4, 6, generator=generator).T,
    }


def table(of=None):
    return [TensorMeta.of(name, tensor) for name, tensor in (of or tensors()).items()]


@pytest.fixture
def file():
    file = WeightFile(table())
    yield file
    file.close()


def poke(file, position, data):
    os.pwrite(file._file.fd, data, position)


def test_what_is_written_is_read_bit_for_bit(file):
    for round_ in (1, 2, 3):
        sent = {name: tensor + round_ for name, tensor in tensors().items()}
        announced = file.write(sent.items())
        assert announced.round == round_
        received = read(announced, table())
        assert [name for name, _ in received] == list(sent)
        for name, tensor in received:
            assert tensor.dtype == sent[name].dtype
            assert torch.equal(tensor, sent[name])


def test_a_reader_in_another_process_reads_the_same(file):
    announced = file.write(tensors().items())
    code = (
        "import sys; from async_rl.weights.shm_file import *\n"
        f"t = read({announced!r}, {table()!r})\n"
        "print(sum(float(x.double().sum()) for _, x in t))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert float(out.stdout) == pytest.approx(sum(float(t.double().sum()) for t in tensors().values()))


def test_a_reader_cannot_change_what_others_read(file):
    announced = file.write(tensors().items())
    read(announced, table())[0][1].fill_(9.0)
    assert torch.equal(read(announced, table())[0][1], tensors()["embed.weight"])


def test_nothing_appears_in_shared_memory(file):
    before = set(os.listdir("/dev/shm"))
    file.write(tensors().items())
    assert set(os.listdir("/dev/shm")) <= before


def test_every_flipped_byte_is_noticed(file):
    """Head, table, digests and tensors: flip each byte that carries anything."""
    announced = file.write(tensors().items())
    content = os.pread(file._file.fd, announced.nbytes, 0)
    padding = _padding(file)
    for position in range(len(content)):
        if position in padding:
            continue
        poke(file, position, bytes([content[position] ^ 0x40]))
        with pytest.raises(WeightSyncError):
            read(announced, table())
        poke(file, position, content[position : position + 1])
    read(announced, table())


def test_invariant_10_a_corrupted_tensor_is_named(file):
    announced = file.write(tensors().items())
    index = list(tensors()).index("layers.0.experts.0.w")
    poke(file, file._layout.data + file._layout.offsets[index] + 3, b"\xff")
    with pytest.raises(
        WeightSyncError, match=r"layers\.0\.experts\.0\.w float32\[3, 1, 2\] does not match its checksum"
    ):
        read(announced, table())


@pytest.mark.parametrize(
    ("position", "data", "message"),
    [
        (0, b"SOMEFILE", "not a weight file"),
        (8, struct.pack("<I", 1), "format version 1, this engine reads 2"),
        (16, struct.pack("<Q", 0), "holds round 0, announced was 1"),
        (24, struct.pack("<Q", 5), "its head says 5"),
        (12, struct.pack("<I", 10**6), "name table does not match"),
        (HEAD.size, b"\x00", "name table does not match"),
    ],
)
def test_a_bad_head_is_refused(file, position, data, message):
    announced = file.write(tensors().items())
    poke(file, position, data)
    with pytest.raises(WeightSyncError, match=message):
        read(announced, table())


def test_a_round_that_was_not_announced_is_refused(file):
    first = file.write(tensors().items())
    file.write(tensors().items())
    with pytest.raises(WeightSyncError, match="holds round 2, announced was 1"):
        read(first, table())


def test_a_round_that_was_not_finished_is_refused(file):
    announced = file.write(tensors().items())
    with pytest.raises(WeightSyncError, match="yielded 1 tensors, its name table has 6"):
        file.write(list(tensors().items())[:1])
    for round_ in (announced.round, announced.round + 1):
        with pytest.raises(WeightSyncError, match="holds round 0"):
            read(replace(announced, round=round_), table())


def test_a_size_that_was_not_announced_is_refused(file):
    announced = file.write(tensors().items())
    with pytest.raises(WeightSyncError, match="announced were"):
        read(replace(announced, nbytes=announced.nbytes + 1), table())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.__setitem__(0, replace(t[0], name="other.weight")),
            r"embed\.weight.* where other\.weight",
        ),
        (
            lambda t: t.__setitem__(0, replace(t[0], shape=(5, 7))),
            r"where embed\.weight float32\[5, 7\] was agreed",
        ),
        (
            lambda t: t.__setitem__(1, replace(t[1], dtype="float16")),
            r"bfloat16\[5\] where layers\.0\.norm\.weight float16",
        ),
        (lambda t: t.pop(), "is not one of 5 tensors"),
    ],
)
def test_another_name_table_than_agreed_is_refused(file, change, message):
    announced = file.write(tensors().items())
    agreed = table()
    change(agreed)
    with pytest.raises(WeightSyncError, match=message):
        read(announced, agreed)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("renamed", torch.zeros(7, 5)),
        ("embed.weight", torch.zeros(5, 7)),
        ("embed.weight", torch.zeros(7, 5).half()),
    ],
)
def test_a_source_that_strays_from_its_name_table_is_refused(file, name, tensor):
    sent = [(name, tensor), *list(tensors().items())[1:]]
    with pytest.raises(WeightSyncError, match=r"where its name table has embed\.weight float32\[7, 5\]"):
        file.write(sent)


def test_a_writer_that_is_gone_is_said_so(file):
    announced = file.write(tensors().items())
    file.close()
    with pytest.raises(WeightSyncError, match="its writer must be alive, and of this user"):
        read(announced, table())


def test_the_file_cannot_shrink_under_a_reader(file):
    announced = file.write(tensors().items())
    with pytest.raises(PermissionError):
        os.ftruncate(file._file.fd, announced.nbytes // 2)


@pytest.fixture
def checkpoint(tmp_path):
    save_file({n: t.contiguous() for n, t in tensors().items()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("embed.weight"), r"lacks 1 tensors, first embed\.weight"),
        (lambda d: d.update(extra=torch.zeros(1)), "has, unlike the checkpoint, 1 tensors, first extra"),
        (
            lambda d: d.update({"embed.weight": torch.zeros(8, 5)}),
            r"tensor embed\.weight: \[8, 5\] in the trainer",
        ),
    ],
)
def test_invariant_10_a_name_table_unlike_the_checkpoint_is_refused(checkpoint, change, message):
    from async_rl.weights.shm_file import check_against_checkpoint

    given = tensors()
    check_against_checkpoint(table(given), checkpoint, ignored=lambda _: False)
    change(given)
    with pytest.raises(WeightSyncError, match=message):
        check_against_checkpoint(table(given), checkpoint, ignored=lambda _: False)


def test_a_tied_output_layer_may_be_spelled_out_or_not(checkpoint):
    from async_rl.weights.shm_file import check_against_checkpoint

    given = {**tensors(), "lm_head.weight": torch.zeros(7, 5)}
    check_against_checkpoint(table(given), checkpoint, ignored=lambda name: name == "lm_head.weight")
    with pytest.raises(WeightSyncError, match=r"first lm_head\.weight"):
        check_against_checkpoint(table(given), checkpoint, ignored=lambda _: False)


def _padding(file):
    """Positions that carry nothing: between head and tensors, and between tensors."""
    layout = file._layout
    used = set(range(len(layout.finished(1, [0] * len(layout.metas)))))
    for meta, offset in zip(layout.metas, layout.offsets, strict=True):
        used.update(range(layout.data + offset, layout.data + offset + meta.nbytes))
    return set(range(layout.nbytes)) - used
