"""Datasets by their name on the Hugging Face Hub, which ``datasets`` downloads and keeps as Arrow files.

Knows ``datasets``, which need not be installed, and ``errors``. What is read is the files, as ``arrow_files`` does.
"""

from __future__ import annotations

from pathlib import Path

from async_rl.config.paths import is_hub_name
from async_rl.errors import DatasetError

_FORM = "hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT"


def check_name(name: Path, key: str, *, allow_download: bool) -> tuple[str, str | None, str]:
    """Return the dataset, configuration and split that ``name``, a value of the setting ``key``, means.

    Raises DatasetError for another form, and where downloads are not allowed.
    """
    parts = str(name).split(":")[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise DatasetError(f"{key} is {name}, which is not of the form {_FORM}; set it to hf:openai/gsm8k:main:train")
    if not allow_download:
        raise DatasetError(
            f"{key} names {name}, which may have to be downloaded, and data.allow_download is false; set it to true, "
            "or save the dataset to a folder and name that: datasets.load_dataset(...).save_to_disk(folder)"
        )
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


def fetch(name: Path, key: str, *, allow_download: bool) -> list[Path]:
    """Return the Arrow files of a dataset of the Hub, downloaded unless they are there. Raises DatasetError."""
    dataset, configuration, split = check_name(name, key, allow_download=allow_download)
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise DatasetError(f"{key} names {name}, which needs datasets; install it: pip install datasets") from None
    try:
        found = load_dataset(dataset, configuration, split=split)
    except Exception as error:  # noqa: BLE001  the library and what it downloads with raise all kinds
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise DatasetError(f"{key}: {name} cannot be loaded: {why}") from None
    files = [Path(entry["filename"]) for entry in found.cache_files]
    if not files:
        raise DatasetError(
            f"{key}: {name} has no files of its own; save it to a folder with save_to_disk and name that"
        )
    return files


def resolved(paths: list[Path], key: str, *, allow_download: bool) -> list[Path]:
    """Return ``paths`` with each name of the Hub replaced by its files. Raises DatasetError."""
    found: list[Path] = []
    for path in paths:
        found += fetch(path, key, allow_download=allow_download) if is_hub_name(path) else [path]
    return found
