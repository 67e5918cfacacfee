"""Files of a run folder that grow with its steps: bounded or compressed, cut at a step in no more than they lose."""

import json
import os
import random
import time

import pytest

from async_rl.runtime import rolling
from async_rl.runtime.rolling import RollingLines, open_part, parts


def line(step, **more):
    return json.dumps({"step": step, **more})


def steps(path):
    return [json.loads(text)["step"] for part in parts(path) for text in open_part(part)]


def filled(path, count, **options):
    lines = RollingLines(path, **options)
    for step in range(1, count + 1):
        lines.append(line(step))
    return lines


def test_a_full_file_is_rolled_and_only_the_newest_parts_are_kept(tmp_path):
    filled(tmp_path / "samples.jsonl", 100, max_bytes=100, keep=2).close()
    names = [path.name for path in parts(tmp_path / "samples.jsonl")]
    assert names[:-1] == ["samples-000011.jsonl", "samples-000012.jsonl"]
    found = steps(tmp_path / "samples.jsonl")
    assert found == list(range(found[0], 101))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * 120


def test_without_keep_every_line_stays_and_older_parts_are_compressed(tmp_path):
    filled(tmp_path / "trained.jsonl", 100, max_bytes=500).close()
    assert steps(tmp_path / "trained.jsonl") == list(range(1, 101))
    assert {path.suffix for path in parts(tmp_path / "trained.jsonl")[:-1]} == {".gz"}
    (tmp_path / "rewound-trained-000001.jsonl.gz").write_bytes(b"")  # another file's part
    assert steps(tmp_path / "trained.jsonl") == list(range(1, 101))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("keep", [None, 3])
def test_lines_after_a_step_are_moved_aside_whatever_was_rolled(tmp_path, seed, keep, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(rolling, "_BLOCK", draw.choice([1, 7, 64, 4096]))
    path, aside = tmp_path / "a.jsonl", tmp_path / "rewound-a.jsonl"
    lines = RollingLines(path, max_bytes=draw.choice([1, 60, 200]), keep=keep)
    rewound = RollingLines(aside, max_bytes=None if keep else 100, keep=keep)
    kept, moved, step = [], [], 0
    for _ in range(5):
        for _ in range(draw.randrange(12)):
            step += 1
            for _ in range(draw.choice([1, 1, 2])):
                lines.append(line(step, text="x" * draw.randrange(40)))
                kept.append(step)
        lines.close()
        if keep:
            kept = steps(path)
        back = draw.choice([0, step, max(0, step - 3), draw.randrange(step + 1)])
        moved += [other for other in kept if other > back]
        kept, step = [other for other in kept if other <= back], back
        lines.move_after(back, rewound)
        assert steps(path) == kept
        assert steps(aside) == moved


def test_a_line_that_was_cut_off_is_moved_too(tmp_path):
    lines = filled(tmp_path / "a.jsonl", 3)
    lines.close()
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    lines.move_after(3, RollingLines(tmp_path / "b.jsonl"))
    assert steps(tmp_path / "a.jsonl") == [1, 2, 3]
    assert (tmp_path / "b.jsonl").read_text() == '{"step": 4, "lo'


def test_a_part_that_a_kill_left_uncompressed_or_twice_counts_once(tmp_path):
    path = tmp_path / "t.jsonl"
    filled(path, 100, max_bytes=300).close()
    first = parts(path)[0]
    first.with_suffix("").write_bytes(open_part(first).read())  # killed before the uncompressed one was removed
    assert steps(path) == list(range(1, 101))
    lines = RollingLines(path, max_bytes=300)
    lines.move_after(2, RollingLines(tmp_path / "aside.jsonl"))
    assert steps(path) == [1, 2]
    assert [part.name for part in parts(path)] == ["t.jsonl"]
    (tmp_path / "t-000001.jsonl").write_text(line(1) + "\n")  # killed before it was compressed
    path.write_text("")
    for step in range(2, 40):
        lines.append(line(step))
    lines.close()
    assert steps(path) == list(range(1, 40))
    assert {part.suffix for part in parts(path)[:-1]} == {".gz"}


def test_a_cut_reads_what_it_moves_and_not_the_file(tmp_path, monkeypatch):
    path = tmp_path / "big.jsonl"
    row = (line(1, text="x" * 1000) + "\n").encode()
    path.write_bytes(row * 100_000)
    lines = RollingLines(path)
    for step in (2, 3):
        lines.append(line(step))
    read = []
    seen = rolling._step
    monkeypatch.setattr(rolling, "_step", lambda text: read.append(text) or seen(text))
    inode, began = path.stat().st_ino, time.process_time()
    lines.move_after(1, RollingLines(tmp_path / "aside.jsonl"))
    assert len(read) == 3
    assert time.process_time() - began < 1.0  # the whole file takes several
    assert (path.stat().st_ino, path.stat().st_size) == (inode, 100_000 * len(row))


def test_a_file_that_is_written_again_after_a_cut_goes_on(tmp_path):
    lines = filled(tmp_path / "a.jsonl", 5)
    lines.move_after(2, RollingLines(tmp_path / "b.jsonl"))
    lines.append(line(3))
    assert steps(tmp_path / "a.jsonl") == [1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl"]
