"""Logging of one process of a run: structlog over the standard library. Knows ``runfolder``'s JSON only.

    loggers of async_rl  ──► logs/<role>.jsonl, and warnings to the console if requested
    all other loggers    ──► logs/<role>.libs.log (vLLM, Ray, Megatron, Python warnings), never the console
    processes that a library starts ──► logs/<role>.<process>.libs.log, if they call ``log_libraries``

An event is a constant snake_case name with fields: ``log.warning("group_timed_out", group=..., finished=3)``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import Processor

from async_rl.runtime.process import dump_stacks_to
from async_rl.runtime.rolling import ERRORS
from async_rl.runtime.runfolder import to_json

_OURS = "async_rl"
# Libraries that add handlers to their top logger and stop propagation there.
_LIBRARIES = ("vllm", "ray", "megatron", "transformers")
_LIBRARY_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FOR_CHILDREN = "ASYNC_RL_CHILDREN_LOG"
# The last line of a traceback.
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b.*")
# Of each log of each process: about 70,000 lines, and four times as many before the oldest are removed.
MAX_BYTES, OLDER_FILES = 16 * 2**20, 3

_bound: dict[str, Any] = {}


def bind(**fields: Any) -> None:
    """Add these fields to each later line of this process: its policy version, for example."""
    _bound.update(fields)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr: the live table redirects it while it is on screen."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _File(RotatingFileHandler):
    """Writes a log file; says once on stderr that it cannot, where other handlers print a traceback for each line."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            sys.stderr.write(f"async-rl: {self.baseFilename}: {error.strerror}; lines are lost until there is room\n")


def configure(run_dir: Path | None, role: str, *, console: bool) -> None:
    """Set up this process's logging; the last call counts.

    run_dir: where to write files; None writes none. Its name (the run), the role and the fields of ``bind`` are in each
    line. console: warnings and errors also go to stderr; the live view shows the rest.
    """
    ours = logging.getLogger(_OURS)
    root = logging.getLogger()
    for logger in (ours, root):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    ours.propagate = False
    ours.setLevel(logging.INFO)
    root.setLevel(logging.INFO)

    _bound.clear()
    bind(role=role, **({} if run_dir is None else {"run": run_dir.name}))
    shared = _shared_processors()
    if console:
        stderr = _formatted(_StderrHandler(), _console_renderer(), shared)
        stderr.setLevel(logging.WARNING)
        ours.addHandler(stderr)
    if run_dir is not None:
        folder = run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        own = _rotating(folder / f"{role}.jsonl")
        ours.addHandler(_formatted(own, structlog.processors.JSONRenderer(serializer=_dump), shared))
        dump_stacks_to(folder / f"{role}.stacks.txt")
        libraries: logging.Handler = _rotating(folder / f"{role}.libs.log")
        libraries.setFormatter(logging.Formatter(_LIBRARY_FORMAT))
    else:
        libraries = logging.NullHandler()
    root.addHandler(libraries)
    if not ours.handlers:
        ours.addHandler(logging.NullHandler())
    adopt_libraries()
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def older(path: Path, number: int) -> Path:
    """Return the file that holds what was in the log ``path`` before; its number 1 is the newest of the older ones."""
    return path.with_suffix(f".{number}{path.suffix}")


def files(path: Path) -> list[Path]:
    """Return the files of the log ``path``, oldest first, as far as they exist."""
    found = (*(older(path, number) for number in range(OLDER_FILES, 0, -1)), path)
    return [file for file in found if file.exists()]


def _rotating(path: Path) -> RotatingFileHandler:
    # A lone surrogate in a field must not cost the line.
    handler = _File(path, maxBytes=MAX_BYTES, backupCount=OLDER_FILES, encoding="utf-8", errors=ERRORS, delay=True)
    handler.namer = lambda name: str(older(path, int(name.rpartition(".")[2])))
    return handler


def lend_to_children(run_dir: Path, role: str) -> None:
    """Have the processes that a library starts from this one write their logs where this process has its own."""
    if run_dir.is_dir():
        os.environ[_FOR_CHILDREN] = str((run_dir / "logs" / role).absolute())


def log_libraries(process: str) -> None:
    """Write what libraries log in this process, which ``lend_to_children`` was called for, to its own file."""
    prefix = os.environ.get(_FOR_CHILDREN)
    if prefix is None:
        return
    handler = _rotating(Path(f"{prefix}.{process}.libs.log"))
    handler.setFormatter(logging.Formatter(_LIBRARY_FORMAT))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


def children_logs(run_dir: Path, role: str) -> dict[Path, int]:
    """Return {file: bytes} of the logs that children of ``role`` have written so far."""
    return {path: path.stat().st_size for path in (run_dir / "logs").glob(f"{role}.*.libs.log")}


def children_fault(run_dir: Path, role: str, since: Mapping[Path, int]) -> tuple[str, Path] | None:
    """Return the exception that a child of ``role`` logged first after ``since``, and its file; None if none did."""
    for path in sorted(children_logs(run_dir, role)):
        with path.open("rb") as stream:
            stream.seek(since.get(path, 0))
            lines = stream.read(MAX_BYTES).decode(errors="replace").splitlines()
        if (fault := next((line for line in lines if _EXCEPTION.match(line)), None)) is not None:
            return fault, path
    return None


def adopt_libraries() -> None:
    """Remove the handlers that libraries added. Call it again after importing a library that adds some."""
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True


def _add_bound(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in _bound.items():
        event.setdefault(key, value)
    return event


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        _add_bound,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]


def _console_renderer() -> Processor:
    if sys.stderr.isatty():
        return structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)
    return structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "role", "event"])


def _formatted(handler: logging.Handler, renderer: Processor, shared: list[Processor]) -> logging.Handler:
    handler.setFormatter(
        ProcessorFormatter(
            processors=[ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,  # our own plain logging.getLogger(...) calls
        )
    )
    return handler


def _dump(event: Any, **_: Any) -> str:
    return to_json(event)
