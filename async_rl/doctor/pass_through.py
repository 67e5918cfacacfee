"""Checks that Megatron and the engines have the fields that trainer.megatron, trainer.ddp and rollout.engine_args name.

The names are read from the sources of the packages that are installed, without importing these, which takes seconds.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from async_rl.config.schema import RunConfig
from async_rl.doctor.check import Check
from async_rl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """Where a package declares the fields of a configuration."""

    package: str
    title: str
    """The object's name for users."""
    files: str
    """Glob pattern within the package."""
    classes: tuple[str, ...] = ()
    """The classes that have the fields; empty for all in the files."""


TRANSFORMER = Source(
    "megatron", "Megatron's TransformerConfig", "core/**/*_config.py", ("ModelParallelConfig", "TransformerConfig")
)
DDP = Source(
    "megatron",
    "Megatron's DistributedDataParallelConfig",
    "core/distributed/distributed_data_parallel_config.py",
    ("DistributedDataParallelConfig",),
)
VLLM = Source("vllm", "vLLM's AsyncEngineArgs", "engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))
SGLANG = Source("sglang", "SGLang's ServerArgs", "srt/arg_groups/fields/*.py")


def names(config: RunConfig) -> Iterator[Check]:
    """Refuse names that the installed packages do not have, with the nearest that they have."""
    engine = {"vllm": VLLM, "sglang": SGLANG}.get(config.rollout.engine_names[0])
    sections = [("trainer.megatron", config.trainer.megatron, TRANSFORMER), ("trainer.ddp", config.trainer.ddp, DDP)]
    if engine is not None:
        sections.append(("rollout.engine_args", config.rollout.engine_args, engine))
    for section, given, source in sections:
        if not given:
            continue
        python = config.rollout.sglang.python if source is SGLANG else None
        known = fields(source, folders(source.package, python))
        if not known:
            yield Check(section, "warn", f"its names are not checked: {source.package} is not installed here")
            continue
        unknown = [name for name in given if name not in known]
        yield from (_unknown(section, name, known, source) for name in unknown)
        if not unknown:
            yield Check(section, "ok", f"{', '.join(given)} of {source.title}")


def folders(package: str, python: Path | None = None) -> list[Path]:
    """Return the folders of an installed package; ``python``: of the environment of that program."""
    if python is not None:
        return sorted(python.parent.parent.glob(f"lib/python*/site-packages/{package}"))
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]


def fields(source: Source, where: Sequence[Path]) -> set[str]:
    """Return the names of the fields; empty where the package, or these files of it, are absent."""
    files = [file for folder in where for file in sorted(folder.glob(source.files))]
    return {
        statement.target.id
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and (not source.classes or node.name in source.classes)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
    }


def _unknown(section: str, name: str, known: set[str], source: Source) -> Check:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return Check(
        f"{section}.{name}"[:200],
        "FAIL",
        f"{source.title} has no such field",
        f"did you mean {', '.join(near)}?" if near else f"remove it from {section}",
        ConfigError,
    )
