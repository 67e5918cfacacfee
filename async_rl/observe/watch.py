"""Shows a run live in a terminal, as one picture of at least 80 columns and 24 lines.

Owns the terminal while it shows the run (on a separate screen, so that nothing of the shell's is lost) and restores it
at the end, on Ctrl-C and on exceptions; the last picture stays. Knows ``history`` and the fields of a row. Keeps only
what it shows, so that a long run takes as much memory as a short one and, after the first picture, as much time.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, ConsoleDimensions, Group
from rich.control import Control
from rich.panel import Panel
from rich.text import Text

from async_rl.config.inputs import HELD_OUT
from async_rl.metrics.live import clock, size
from async_rl.observe import history
from async_rl.observe.history import Event
from async_rl.observe.rows import Row, as_number, evals, kl, kl_size, partial_share, split, tokens

RECENT = 20
"""Steps over which pace and utilization are taken: one alone is too noisy."""
_POINTS = 512
_EVENTS = 200
_LABEL, _VALUE, _NOTE = 13, 10, 22
_SETS = 3  # evaluation sets that are shown beside that of data.eval
_LEVELS = "▁▂▃▄▅▆▇█"
_FULL, _EMPTY = "█", "░"
_ASCII = str.maketrans(_LEVELS + _EMPTY + "·…", "_.:-=+*#" + ".-~")
_STYLES = {"warning": "yellow", "error": "bold red", "critical": "bold red"}


class Curve:
    """A value over the whole run in constant memory: means over equally many steps, coarser in a longer run."""

    def __init__(self) -> None:
        self.last: float | None = None
        self._sums: list[tuple[float, int]] = []
        self._steps_each, self._steps_in_last = 1, 1

    def add(self, value: float | None) -> None:
        """Add the value of the next step; None leaves a gap."""
        if self._steps_in_last == self._steps_each:
            if len(self._sums) == _POINTS:
                self._sums = [_added(self._sums[i : i + 2]) for i in range(0, _POINTS, 2)]
                self._steps_each *= 2
            self._sums.append((0.0, 0))
            self._steps_in_last = 0
        self._steps_in_last += 1
        if value is not None:
            self.last = value
            self._sums[-1] = _added([self._sums[-1], (value, 1)])

    def means(self, most: int) -> list[float | None]:
        """Return the means of the run's parts, at most ``most``, from its first step to its last."""
        parts = min(most, len(self._sums))
        edges = [i * len(self._sums) // parts for i in range(parts + 1)] if parts else [0]
        sums = [_added(self._sums[left:right]) for left, right in itertools.pairwise(edges)]
        return [total / count if count else None for total, count in sums]


class Story:
    """The shown values of the run in a folder. ``append`` adds a row; ``clear`` removes all."""

    def __init__(self, path: Path) -> None:
        """Read the run so far. Raises RunFolderError."""
        self.clear()
        self.run = history.read(path, into=self)
        del self.run.events[:-_EVENTS]

    def refresh(self) -> None:
        """Read what was added. Raises RunFolderError."""
        self.run.refresh()
        del self.run.events[:-_EVENTS]

    def append(self, row: Row, /) -> None:
        self.recent.append(row)
        self.reward.add(as_number(row.get("reward_mean")))
        for name, value in evals(row).items():
            self.evals.setdefault(name, Curve()).add(value)
        self.on_policy.add(kl_size(stale=False)(row))
        self.stale.add(kl_size(stale=True)(row))

    def clear(self) -> None:
        self.recent = deque[Row](maxlen=RECENT)
        self.reward, self.on_policy, self.stale = Curve(), Curve(), Curve()
        self.evals: dict[str, Curve] = {}  # by set

    def mean(self, key: str) -> float | None:
        """Return the mean of a value over the recent steps; None if none of them has it."""
        values = [value for row in self.recent if (value := as_number(row.get(key))) is not None]
        return math.fsum(values) / len(values) if values else None

    def seconds_left(self) -> float | None:
        """Return the time to the last step at the pace of the recent ones, evaluations and checkpoints included."""
        step = as_number(self.recent[-1].get("step")) if self.recent else None
        if step is None:
            return None
        each = self.mean("step_seconds")
        first, last = (as_number(self.recent[i].get("elapsed_s")) for i in (0, -1))
        if first is not None and last is not None and last > first:
            each = (last - first) / (len(self.recent) - 1)
        return None if each is None else each * max(0.0, self.run.steps - step)

    def state(self) -> tuple[str, str]:
        """Return the state of the run in words, and the style to write it in."""
        summary = self.run.summary
        if summary is not None:
            reason = str(summary.get("exit_reason", "-")) if isinstance(summary, dict) else "-"
            known = {"finished": "bold green", "interrupted": "bold yellow"}
            return (reason, known[reason]) if reason in known else (f"failed: {reason}", "bold red")
        if not self.run.running:
            when = "" if self.recent else " before its first step"
            return f"stopped{when} without a summary: killed, or its driver runs on another machine", "bold red"
        return ("running", "bold green") if self.recent else ("starting: no step has ended yet", "bold")


def picture(story: Story, now: float, width: int, height: int, *, blocks: bool = True) -> Panel:
    """Draw a run in at most ``width`` columns and ``height - 1`` lines; the last line is left to the shell's prompt.

    now: seconds since 1970. blocks: whether the terminal has Unicode's block characters; ASCII otherwise.
    """
    inner, room = max(1, width - 4), height - 3
    state, style = story.state()
    # A failure's reason may be long, and is the most important part.
    lines = [Text(line, style) for line in textwrap.wrap(_printable(state), inner, max_lines=3, placeholder=" …")]
    if story.recent:
        lines += [_progress(story, now, inner), *_utilization(story, inner), *_curves(story, inner)]
        lines += [*_facts(story.recent[-1]), *_versions(story.recent[-1], inner)]
    if room > len(lines):
        lines += [_event(event, now) for event in story.run.events[len(lines) - room :]]
    lines = lines[: max(1, room)]
    title = Text(f"async_rl · {_printable(story.run.name)}", "bold")
    for line in (*lines, title):
        line.truncate(inner, overflow="ellipsis")
        if not blocks:
            line.plain = line.plain.translate(_ASCII).replace(_FULL, "#").encode("ascii", "replace").decode()
        line.no_wrap, line.overflow = True, "crop"
    return Panel(Group(*lines), title=title, width=width)


def watch(path: Path, *, once: bool = False, stream: TextIO | None = None, period_s: float = 1.0) -> int:
    """Show the run in the folder ``path`` until it ends or Ctrl-C; with ``once``, or without a terminal, only once.

    period_s: seconds between two pictures. Returns the exit code, 0. Raises RunFolderError.
    """
    stream = stream if stream is not None else sys.stdout
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    # Passed explicitly: rich would also take FORCE_COLOR for a terminal. It follows NO_COLOR by itself.
    console = Console(file=stream, force_terminal=terminal, highlight=False)
    blocks = _has_blocks(stream)

    def draw(story: Story) -> Panel:
        terminal_size = shutil.get_terminal_size((80, 24))
        console.size = ConsoleDimensions(*terminal_size)
        return picture(story, time.time(), *terminal_size, blocks=blocks)

    story: Story | None = None
    try:
        story = Story(path)
        if terminal and not once and story.run.running:
            with console.screen() as screen:
                while story.run.running:
                    console.control(Control.home())
                    screen.update(draw(story))
                    time.sleep(period_s)
                    story.refresh()
    except KeyboardInterrupt:
        pass
    if story is not None:
        console.print(draw(story))
    return 0


def _progress(story: Story, now: float, inner: int) -> Text:
    row, steps = story.recent[-1], story.run.steps
    step, at = as_number(row.get("step")), as_number(row.get("time"))
    share = min(1.0, (step or 0.0) / max(1, steps))
    # Rounded down: 100% means that the run is done.
    after = f"  {math.floor(share * 100)}%"
    if story.run.running:
        after += f"   {_clock(story.seconds_left())} left"
    after += f"   last {_clock(None if at is None else now - at)} ago"
    before = f"step {_say(step, '.0f')} of {steps}  "
    return Text.assemble((before, "bold"), _bar(share, inner - len(before) - len(after)), after)


def _utilization(story: Story, inner: int) -> Iterable[Text]:
    for side in ("rollout", "trainer"):
        idle = story.mean(f"{side}_idle_ratio")
        busy = None if idle is None else 1 - idle
        yield _line(side, _bar(busy or 0.0, inner - _LABEL - 12), f"  {_say(busy, '4.0%'):>4} busy")
    efficiency = _say(as_number(story.recent[-1].get("overlap_efficiency")), ".2f")
    yield _line("overlap", f"efficiency {efficiency}", (f"   (busy: mean of the last {RECENT} steps)", "dim"))


def _curves(story: Story, inner: int) -> Iterable[Text]:
    width = max(1, inner - _LABEL - _VALUE - _NOTE)
    row = story.recent[-1]
    held_out = story.evals.get(HELD_OUT) or Curve()
    others = [(name, curve) for name, curve in story.evals.items() if name != HELD_OUT]
    # The latest evaluation, whichever step had it; but a reward only if the last step has one.
    lines = [("reward", story.reward, as_number(row.get("reward_mean")))]
    lines += [(label, curve, curve.last) for label, curve in (("eval", held_out), *others[:_SETS])]
    for label, curve, value in lines:
        means = curve.means(width)
        low, high = _range(means)
        # The range of the drawn values, which are means of several steps in a long run.
        note = "" if low is None else f"avg {low:.2g} to {high:.2g}"
        yield _curve(label[: _LABEL - 1], _sparkline(means, low, high, width), _say(value, ".3g"), note)
    # On one scale: the distance between the two is what matters.
    on_policy, stale = ([_log(mean) for mean in curve.means(width)] for curve in (story.on_policy, story.stale))
    low, high = _range([value for value in on_policy + stale if value != -math.inf])
    mismatch, drift = (_say(kl(row, stale=stale), ".1e") for stale in (False, True))
    yield _curve("kl on-policy", _sparkline(on_policy, low, high, width), mismatch, "staleness 0")
    yield _curve("kl stale", _sparkline(stale, low, high, width), drift, "staleness 1 and more")
    scale = "" if low is None or high is None else f", {10**low:.1e} to {10**high:.1e}"
    yield _line("", (f"whole run; kl is |ppo_kl| on one log scale{scale}", "dim"))


def _curve(label: str, sparkline: str, value: str, note: str) -> Text:
    return _line(label, (sparkline, "cyan"), f"{value:>{_VALUE}}", (f"  {note}", "dim"))


def _facts(row: Row) -> Iterable[Text]:
    def say(key: str, form: str) -> str:
        return _say(as_number(row.get(key)), form)

    ages = tokens(row)
    masked, trained = split(row, "tokens_masked"), math.fsum(ages.values())
    mean = math.fsum(age * count for age, count in ages.items()) / trained if trained else None
    most = max((age for age, count in ages.items() if count), default=None)
    yield _line(
        "staleness",
        f"mean {_say(mean, '.2f')}   max {_say(most, 'd')}   "
        f"masked {_say(math.fsum(masked.values()) if masked else None, '.0f')} tokens   "
        f"clipped {say('clip_fraction', '.1%')}",
    )
    yield _line(
        "partial", f"{_say(partial_share(row), '.0%')} of trajectories, up to {say('max_segments', '.0f')} segments"
    )
    queued, outstanding = say("queue_groups", ".0f"), say("groups_outstanding", ".0f")
    yield _line("queue", f"{queued} groups, {_size(as_number(row.get('queue_bytes')))}   {outstanding} outstanding")
    seconds = _say(split(row, "sync_seconds").get("total"), ".3f")
    yield _line("sync", f"{seconds} s   canary {say('sync_canary_logprob_abs_diff', '.1e')}")


def _versions(row: Row, inner: int) -> Iterable[Text]:
    """Show the replicas by version, those furthest behind first, so that they stay when there is no room."""
    policy = as_number(row.get("policy_version"))
    at: dict[float, list[str]] = {}
    for replica, version in split(row, "replica_versions").items():
        at.setdefault(version, []).append(replica)
    line = _line("versions", f"policy {_say(policy, '.0f')}")
    lines = [line]
    for version in sorted(at):
        behind = 0.0 if policy is None else policy - version
        lag = f" ({behind:.0f} behind)" if behind > 0 else ""
        part = f"{'replicas' if len(at[version]) > 1 else 'replica'} {' '.join(at[version])}: {version:.0f}{lag}"
        if line.cell_len + 3 + len(part) > inner and len(lines) < 5:
            line = _line("", "")
            lines.append(line)
        line.append(f"{'   ' if line.plain.strip() else ''}{part}", "bold yellow" if lag else "")
    return lines


def _event(event: Event, now: float) -> Text:
    ago = f"{_clock(now - event.time)} ago" if event.time else "-"
    style = _STYLES.get(event.level, "")
    level = "" if event.level in ("info", "debug", "") else f"{str(event.level).upper()} "
    return _line(ago, (f"{level}{_printable(event.text)}", style))


def _line(label: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{label:<{_LABEL - 1}} ", "bold"), *parts)


def _bar(share: float, width: int) -> str:
    full = round(min(1.0, max(0.0, share)) * max(0, width))
    return _FULL * full + _EMPTY * (max(0, width) - full)


def _sparkline(values: Sequence[float | None], low: float | None, high: float | None, width: int) -> str:
    def level(value: float | None) -> str:
        if value is None:
            return " "
        if low is None or high is None or value < low:
            return _LEVELS[0]
        return _LEVELS[round((value - low) / (high - low) * (len(_LEVELS) - 1)) if high > low else 3]

    return "".join(map(level, values)).ljust(width)


def _range(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return min(known, default=None), max(known, default=None)


def _log(value: float | None) -> float | None:
    """Return the logarithm of a value that is not negative; 0 lies below every other."""
    if value is None:
        return None
    return math.log10(value) if value > 0 else -math.inf


def _added(parts: Iterable[tuple[float, int]]) -> tuple[float, int]:
    sums, counts = zip(*parts, strict=True)
    return sum(sums), sum(counts)


def _say(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _printable(text: object) -> str:
    """Remove characters that would move the cursor: a log line may contain a model's output."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} d"
    return clock(max(0.0, seconds))


def _size(count: float | None) -> str:
    return "- B" if count is None else size(count)


def _has_blocks(stream: TextIO) -> bool:
    try:
        (_LEVELS + _EMPTY + "·…").encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
