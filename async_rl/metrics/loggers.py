"""Loggers that people already use, TensorBoard and Weights & Biases, behind one small interface. Off by default.

They get the rows of metrics.jsonl by the same names; a split by a label becomes a folder (``ppo_kl_by_staleness/0``).
One that fails in the middle of a run is dropped, with a warning: no run ends because of its logger. Knows the two
packages, which are imported only where ``metrics.loggers`` names them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from async_rl.config import LoggerName
from async_rl.errors import ConfigError

log = structlog.get_logger(__name__)

Row = Mapping[str, Any]


class Logger(Protocol):
    """Takes note of a run. Any method may raise anything."""

    def step(self, row: Row) -> None:
        """One training step, as in metrics.jsonl."""
        ...

    def finish(self, summary: Row) -> None:
        """The run has ended, with this summary.json."""
        ...

    def close(self) -> None: ...


class Loggers:
    """All loggers of a run; never raises."""

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)

    def step(self, row: Row) -> None:
        self._each(lambda logger: logger.step(row))

    def finish(self, summary: Row) -> None:
        self._each(lambda logger: logger.finish(summary))

    def close(self) -> None:
        """May be called twice."""
        self._each(lambda logger: logger.close())
        self._loggers = {}

    def _each(self, tell: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                tell(logger)
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                log.warning("a logger failed and is left out from now on", logger_name=name, reason=repr(error))
                del self._loggers[name]


def open_loggers(names: Sequence[LoggerName], run_dir: Path, settings: Mapping[str, Any]) -> Loggers:
    """settings: of the run, for those that show them. Raises ConfigError where a package is missing."""
    makers: dict[LoggerName, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoard(run_dir / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(run_dir, settings),
    }
    loggers: dict[str, Logger] = {}
    for name in names:
        try:
            loggers[name] = makers[name]()
        except ImportError as error:
            raise ConfigError(f"metrics.loggers: {name} is not installed ({error}); pip install {name}") from None
    return Loggers(loggers)


class TensorBoard:
    """Event files in ``folder``. By tensorboard's own writer: torch's would bring torch into the driver."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def step(self, row: Row) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=row["time"], step=row["step"], summary=summary))

    def finish(self, summary: Row) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project async_rl; WANDB_MODE=offline and the like are the user's to set."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        # The same id for the same folder, so that a run that is gone on with goes on there as well.
        identity = f"{run_dir.name}-{zlib.crc32(str(run_dir.absolute()).encode()):08x}"
        self._run = wandb.init(
            project="async_rl",
            name=run_dir.name,
            id=identity,
            resume="allow",
            dir=run_dir,
            config=dict(settings),
            # The terminal is the live view's.
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )

    def step(self, row: Row) -> None:
        self._run.log(dict(scalars(row)), step=row["step"])

    def finish(self, summary: Row) -> None:
        self._run.summary.update(dict(scalars(summary)))

    def close(self) -> None:
        self._run.finish()


def scalars(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row with their names; what has no value is left out."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, float(value)
