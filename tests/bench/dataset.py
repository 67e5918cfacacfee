"""What a long dataset costs before and while a run reads it: memory, seconds to the first prompt, prompts per second.

Writes files of --rows and of a tenth of it, with about 700 bytes per row, and reads each in a process of its own:
opening, as many rows as data.rows_in_memory, a shuffled cursor, then --prompts prompts in its order. Tokens are bytes,
so that no tokenizer is measured. Printed last is one JSON line, in which each figure is [of a tenth, of all]:

    open_s          seconds until the files are hashed and their rows can be found; Parquet is unpacked in it
    first_prompt_s  seconds from then to the first prompt, with the rows that are checked before
    memory_mb       what the process has gained by then, without pages of mapped files
    prompts_per_s   while prompts are issued in random order

    .venv/bin/python -m tests.bench.dataset [--rows 1000000] [--kind jsonl] [--prompts 2000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from async_rl.config.inputs import DataSection
from async_rl.data.cursor import DatasetCursor
from async_rl.data.dataset import read_dataset
from async_rl.data.files import open_files
from async_rl.data.prompts import RowReader
from tests.support.datasets import TextEncoder

ROWS_IN_MEMORY = DataSection.model_fields["rows_in_memory"].default
_FILLER = "The train leaves at nine and arrives before noon, if the bridge is open. " * 8


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield rows in verl's form."""
    for number in range(count):
        yield {
            "data_source": "bench",
            "prompt": [{"role": "user", "content": f"{number}: {_FILLER}"}],
            "reward_model": {"style": "rule", "ground_truth": str(number)},
        }


def write(path: Path, count: int) -> None:
    """Write rows as JSONL or Parquet, by the file's name."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
        return
    import pyarrow
    from pyarrow import parquet

    found, writer = rows(count), None
    while batch := [row for _, row in zip(range(50_000), found, strict=False)]:
        table = pyarrow.Table.from_pylist(batch)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def private_bytes() -> int:
    """Return what this process holds itself, without mapped files."""
    found = psutil.Process().memory_info()
    return int(found.rss - found.shared)


def measure(path: Path, prompts: int) -> dict[str, float]:
    """Read a file as a run does, in this process."""
    before, began = private_bytes(), time.monotonic()
    files = open_files(path, key="data.train", cache=path.parent / "cache", in_memory=ROWS_IN_MEMORY)
    opened = time.monotonic()
    reader = RowReader(TextEncoder(lambda text: list(text.encode())), format="verl")
    dataset = read_dataset(files, reader, on_bad_row="fail", in_memory=ROWS_IN_MEMORY)
    cursor = DatasetCursor(dataset, shuffle=True, seed=0)
    cursor.next()
    first, held = time.monotonic(), private_bytes()
    for _ in range(prompts):
        cursor.next()
    return {
        "open_s": round(opened - began, 2),
        "first_prompt_s": round(first - opened, 2),
        "memory_mb": round((held - before) / 2**20, 1),
        "prompts_per_s": round(prompts / (time.monotonic() - first)),
    }


def main() -> None:
    """Measure a tenth of the rows and all of them; print what each cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--prompts", type=int, default=2000)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (options.rows // 10, options.rows):
            path = Path(folder) / f"{count}.{options.kind}"
            write(path, count)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(measure, (path, options.prompts)))
    figures = {key: [one[key] for one in found] for key in found[0]}
    print(json.dumps({"rows": options.rows, "kind": options.kind, **figures}))


if __name__ == "__main__":
    main()
