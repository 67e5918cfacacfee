"""The live view of a run: one table on a terminal, elsewhere one key=value line per step.

Owns the terminal while it is open and restores it on ``close``, which a ``with`` block guarantees on exceptions and
Ctrl-C. Knows the run's records and the words for its events. Starts no thread, so it takes no time from the run between
two updates.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from structlog.processors import LogfmtRenderer

from async_rl.metrics.events import in_words
from async_rl.metrics.records import StepRecord, SyncRecord, weighted_mean

_render_line = LogfmtRenderer(key_order=["event"])


class LiveView:
    """The progress of one run, updated from the driver's thread."""

    def __init__(self, run: str, steps: int, stream: TextIO | None = None) -> None:
        self.run, self.steps = run, steps
        self._stream = stream if stream is not None else sys.stdout
        self._record: StepRecord | None = None
        self._sync: SyncRecord | None = None
        self._first_reward: float | None = None
        self._evals: list[float] = []
        self._event = "starting"
        self._event_at = time.monotonic()
        self._live: Live | None = None
        # rich would also take FORCE_COLOR for a terminal, and write cursor movements into a log file.
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            console = Console(file=self._stream)
            # Live also redirects stdout and stderr, so log lines appear above the table instead of tearing it.
            self._live = Live(self._table(), console=console, auto_refresh=False, vertical_overflow="crop")
            self._live.start(refresh=True)

    def update(self, record: StepRecord) -> None:
        """Show a finished training step."""
        self._record = record
        if self._first_reward is None:
            self._first_reward = record.reward_mean
        if record.eval_reward_mean is not None:
            self._evals.append(record.eval_reward_mean)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._line(step_line(record, self.steps, self._sync))

    def sync(self, record: SyncRecord) -> None:
        """Remember a weight sync, which is shown with the next step."""
        self._sync = record

    def evaluated(self, reward_mean: float) -> None:
        """Show an evaluation outside of a step: before the first, after the last."""
        self._evals.append(reward_mean)
        self.event("evaluated", reward=f"{reward_mean:.3f}")

    def event(self, event: str, **fields: Any) -> None:
        """Show an event, in words on a terminal (``events``), elsewhere as one line of its name and fields."""
        self._event, self._event_at = in_words(event, fields), time.monotonic()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._line({"event": event, **fields})

    def close(self) -> None:
        """Leave the last table on the terminal and restore it. May be called twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, fields: dict[str, Any]) -> None:
        given = {key: value for key, value in fields.items() if value is not None}
        self._stream.write(f"{_render_line(None, '', given)}\n")
        self._stream.flush()

    def _table(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        record = self._record
        if record is not None:
            for label, text in _rows(record, self._sync, self._first_reward, self._evals):
                table.add_row(label, text)
        elif self._evals:
            table.add_row("eval", f"{self._evals[-1]:.3f}")
        ago = time.monotonic() - self._event_at
        table.add_row("last", self._event + (f"  ({clock(ago)} ago)" if ago >= 1 else ""))
        return Panel(Group(self._progress(), Text(), table), title=f"async_rl · {self.run}", width=80)

    def _progress(self) -> Table:
        done = self._record.step if self._record is not None else 0
        line = Table.grid(padding=(0, 2))
        line.add_row(
            f"step {done} of {self.steps}",
            ProgressBar(total=self.steps, completed=done, width=30),
            f"{time_left(self._record, self.steps)} left" if self._record is not None else "",
        )
        return line


def _rows(
    record: StepRecord, sync: SyncRecord | None, first_reward: float | None, evals: list[float]
) -> list[tuple[str, str]]:
    reward = f"{record.reward_mean:.3f}"
    if first_reward is not None and record.step > 1:
        reward += f"  (first {first_reward:.3f})"
    on_policy, stale = record.on_policy, record.stale_kl
    rows = [
        ("reward", reward),
        ("eval", "  ".join(f"{value:.3f}" for value in evals[:1] + evals[1:][-1:]) or "-"),
        (
            "ppo_kl",
            f"on-policy {on_policy.kl if on_policy else float('nan'):.1e}   "
            f"stale {stale if stale is not None else float('nan'):.1e}   "
            f"clipped {record.report.clip_fraction:.1%}",
        ),
        (
            "staleness",
            f"mean {mean_staleness(record):.2f}   max {max(record.token_staleness, default=0)}   "
            f"masked {sum(record.report.tokens_masked.values())} tokens",
        ),
        (
            "partial",
            f"{record.partial_share:.0%} of trajectories, up to {max(record.segments, default=0)} segments",
        ),
        (
            "queue",
            f"{record.queue_groups} groups, {size(record.queue_bytes)}   {record.groups_outstanding} outstanding",
        ),
        (
            "busy",
            f"rollout {1 - record.rollout_idle_ratio:.0%}   trainer {1 - record.trainer_idle_ratio:.0%}   "
            f"overlap {record.overlap_efficiency:.2f}",
        ),
    ]
    if sync is not None:
        canary = f"   canary {sync.canary:.1e}" if sync.canary is not None else ""
        rows.append(("sync", f"version {sync.policy_version} in {sync.seconds:.3f} s{canary}"))
    return rows


def step_line(record: StepRecord, steps: int, sync: SyncRecord | None) -> dict[str, Any]:
    """Return the fields of a step's line for output without a terminal; the caller leaves out those that are None."""
    on_policy, stale = record.on_policy, record.stale_kl
    return {
        "event": "step",
        "step": f"{record.step}/{steps}",
        "left": time_left(record, steps),
        "version": record.policy_version,
        "reward": f"{record.reward_mean:.3f}",
        "eval": None if record.eval_reward_mean is None else f"{record.eval_reward_mean:.3f}",
        "kl_on_policy": None if on_policy is None else f"{on_policy.kl:.1e}",
        "kl_stale": None if stale is None else f"{stale:.1e}",
        "staleness": f"{mean_staleness(record):.2f}",
        "partial": f"{record.partial_share:.2f}",
        "queue": record.queue_groups,
        "queue_bytes": record.queue_bytes,
        "rollout_busy": f"{1 - record.rollout_idle_ratio:.2f}",
        "trainer_busy": f"{1 - record.trainer_idle_ratio:.2f}",
        "sync_s": None if sync is None else f"{sync.seconds:.3f}",
        "step_s": f"{record.step_s:.2f}",
    }


def mean_staleness(record: StepRecord) -> float:
    """Return a step's mean token staleness, 0 for a step without trained tokens."""
    return weighted_mean(record.token_staleness.items()) or 0.0


def time_left(record: StepRecord, steps: int) -> str:
    """Return the time to the last step at the pace so far, as ``clock`` formats it."""
    return clock(record.elapsed_s / max(1, record.step) * max(0, steps - record.step))


def clock(seconds: float) -> str:
    """Format seconds as 1:05 or 2:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Format a number of bytes as 512 B, 1.5 KiB, ..."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
