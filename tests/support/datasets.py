"""Datasets for tests: files read with an encoder that needs no checkpoint."""

from pathlib import Path

from async_rl.data.dataset import Dataset, read_dataset
from async_rl.data.files import open_files
from async_rl.data.prompts import RowReader


class TextEncoder:
    """Encodes text with a function; messages one after the other, each after its role."""

    def __init__(self, encode):
        self._encode = encode

    def text(self, text):
        return self._encode(text)

    def chat(self, messages, tools, variables):
        text = "".join(f"{message['role']}:{message['content']};" for message in messages)
        return text, self._encode(text)


def read_files(
    paths, *, encode, on_bad_row="fail", in_memory=None, cache=Path("nowhere"), settings="", **of_reader
) -> Dataset:
    """Read files as ``data.reading`` does, without a run's settings; ``of_reader`` are fields of ``RowReader``."""
    files = open_files(paths, key="data.train", cache=cache, in_memory=in_memory or 2**31)
    reader = RowReader(TextEncoder(encode), **of_reader)
    return read_dataset(files, reader, on_bad_row=on_bad_row, in_memory=in_memory, settings=settings)
