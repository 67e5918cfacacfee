"""The loggers TensorBoard and Weights & Biases behind one small interface. Off by default.

They get the rows of metrics.jsonl by the same names; a split by a label becomes a folder (``ppo_kl_by_staleness/0``).
A logger that fails during a run is dropped with a warning, so no run ends because of its logger. Knows the two
packages, which are imported only if ``metrics.loggers`` names them.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from async_rl.config.operation import LoggerName
from async_rl.errors import ConfigError

log = structlog.get_logger(__name__)

Row = Mapping[str, Any]

_FIX: Mapping[LoggerName, str] = {
    "tensorboard": "can the run folder be written to?",
    "wandb": "wandb login, or WANDB_MODE=offline, which needs no account (wandb sync uploads the run later)",
}
# Seconds: most that is missing while the run trains, or after it was killed.
_FLUSH_S = 5


class Logger(Protocol):
    """A logger of one run. Any method may raise anything."""

    def step(self, row: Row) -> None:
        """Log one training step, a row of metrics.jsonl."""
        ...

    def finish(self, summary: Row, /) -> None:
        """Log the summary.json of a run that has ended."""
        ...

    def close(self) -> None: ...


class Loggers:
    """All loggers of a run. Never raises."""

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)
        self._dropped: list[Logger] = []

    def step(self, row: Row) -> None:
        self._each(lambda logger: logger.step(row))

    def finish(self, summary: Row) -> None:
        self._each(lambda logger: logger.finish(summary))

    def close(self) -> None:
        """Close every logger. May be called twice."""
        for logger in self._dropped:
            with contextlib.suppress(Exception):  # it was reported when it failed
                logger.close()
        self._each(lambda logger: logger.close())
        self._loggers, self._dropped = {}, []

    def _each(self, tell: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                tell(logger)
            except Exception as error:  # noqa: BLE001 - training continues whatever it is
                log.warning("logger_dropped", logger_name=name, reason=repr(error))
                # Closed at the end of the run only: closing a failed logger may take long.
                self._dropped.append(self._loggers.pop(name))


def open_loggers(names: Sequence[LoggerName], run_dir: Path, settings: Mapping[str, Any]) -> Loggers:
    """Return the loggers that metrics.loggers names; those that show settings get the run's ``settings``.

    Raises ConfigError when a package is missing or does not start.
    """
    makers: dict[LoggerName, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoard(run_dir / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(run_dir, settings),
    }
    loggers: dict[str, Logger] = {}
    for name in names:
        try:
            loggers[name] = makers[name]()
        except Exception as error:  # noqa: BLE001 - each package has its own
            Loggers(loggers).close()
            if isinstance(error, ImportError):
                message = f"{name} is not installed ({error}); pip install {name}"
            else:
                message = f"{name} does not start ({error}); {_FIX[name]}"
            raise ConfigError(f"metrics.loggers: {message}") from None
    return Loggers(loggers)


class TensorBoard:
    """TensorBoard event files in ``folder``, by tensorboard's own writer: torch's would load torch into the driver."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._session = Event, Summary, SessionLog
        self._writer = EventFileWriter(str(folder), flush_secs=_FLUSH_S)
        self._last: int | None = None

    def step(self, row: Row) -> None:
        if self._last is None or row["step"] <= self._last:
            # A run that was rewound to a checkpoint repeats these steps: TensorBoard discards the earlier ones.
            start = self._session(status=self._session.START)
            self._writer.add_event(self._event(wall_time=row["time"], step=row["step"], session_log=start))
        self._last = row["step"]
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=row["time"], step=row["step"], summary=summary))

    def finish(self, _summary: Row, /) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the W&B project async_rl. The user may set WANDB_MODE=offline and other variables."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        # The same id for the same folder, so that a resumed run is resumed there as well.
        identity = f"{run_dir.name}-{zlib.crc32(str(run_dir.absolute()).encode()):08x}"
        self._run = wandb.init(
            project="async_rl",
            name=run_dir.name,
            id=identity,
            resume="allow",
            dir=run_dir,
            config=dict(settings),
            # The live view owns the terminal.
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )

    def step(self, row: Row) -> None:
        self._run.log(dict(scalars(row)), step=row["step"])

    def finish(self, summary: Row) -> None:
        self._run.summary.update(dict(scalars(summary)))

    def close(self) -> None:
        self._run.finish()


def scalars(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row with their names, without those that have no value."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, float(value)
