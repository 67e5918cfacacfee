"""``async-rl report``: writes runs as one self-contained HTML file.

Owns the texts of the report and their order; ``figures`` draws, ``history`` and ``spans`` read. A run folder is not
trusted: every text is escaped, and the file forbids the browser to load or run anything.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config.inputs import HELD_OUT
from async_rl.metrics.events import RESTARTS
from async_rl.observe import figures, gantt, history, transcripts
from async_rl.observe.drawing import STYLE, clock, text
from async_rl.observe.figures import Series
from async_rl.observe.history import Event, History
from async_rl.observe.rows import Number, Read, Row, as_number, evals, kl_size, of, partial_share, tokens
from async_rl.runtime import runfolder

_MOST_AGES = 8
_MOST_EVENTS = 200
_HEAT_COLUMNS = 100

_PAGE = """
:root{color-scheme:light dark;--page:#fff;--card:#f7f8fa;--ink:#16191d;--soft:#5b6470;--line:#dfe3e8}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1c2026;--ink:#eceff2;--soft:#a3adb8;--line:#333a43}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:36px 28px 64px}h1{font-size:30px;line-height:1.2;margin:0 0 4px}
h2{font-size:20px;margin:52px 0 2px;letter-spacing:-.01em}h1,td,th,li,code{overflow-wrap:anywhere}
p{margin:4px 0 16px;max-width:96ch}.good{color:var(--soft)}.missing{color:var(--soft);font-style:italic;margin:12px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr));gap:12px;margin:22px 0 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:11px 14px}
.tiles .all{grid-column:1/-1}dt{color:var(--soft);font-size:12.5px}dd{margin:2px 0 0;font-size:19px;font-weight:600;
line-height:1.3;overflow-wrap:anywhere}dl{margin:0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:18px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:13px 16px 9px;
min-width:0}
figure.wide{grid-column:1/-1;overflow-x:auto}figure.wide>svg{min-width:860px}figcaption small{color:var(--soft)}
figcaption{margin-bottom:4px}.legend{display:flex;flex-wrap:wrap;gap:2px 16px;color:var(--soft);font-size:12.5px;
margin-bottom:4px}.legend span{display:inline-flex;align-items:center;gap:6px}.legend svg{width:auto;height:10px}
table{border-collapse:collapse;margin:20px 0;width:100%}th,td{text-align:left;padding:6px 12px;border-bottom:1px solid
var(--line);vertical-align:top}th{font-weight:600}tbody th{font-weight:400;color:var(--soft)}
td{font-variant-numeric:tabular-nums}.events{list-style:none;padding:0;margin:0;font-size:14px}.events li{padding:3px 0;
border-bottom:1px solid var(--line)}.events time{color:var(--soft);margin-right:12px;font-variant-numeric:tabular-nums}
.events .loud{font-weight:600}.events .loud b{color:var(--c1);margin-right:8px}summary{cursor:pointer;padding:6px 0}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px;overflow:auto;font-size:12.5px}
footer{margin-top:56px;color:var(--soft);font-size:13px}
@media print{main{padding:0}figure,.tiles div{break-inside:avoid}}
"""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a figure: its label, and how a row gives its value."""

    label: str
    read: Read
    marks: bool = False


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Write the report of the run folders ``paths``, side by side, to the file ``out``. Raises RunFolderError."""
    page = Report([history.read(path) for path in paths]).html()
    runfolder.write_atomically(out, page.encode())


class Report:
    """The report of one run, or of several side by side."""

    def __init__(self, runs: Sequence[History]) -> None:
        self._runs = runs
        names = [run.name for run in runs]
        self._names = [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]
        self._several = len(runs) > 1
        self._sets = list(dict.fromkeys(name for run in runs for row in run.rows for name in evals(row)))

    def html(self) -> str:
        title = text(" and ".join(self._names))
        parts = [self._header()]
        if any(run.rows for run in self._runs):
            parts += [self._learning(), self._policy(), self._staleness(), self._waiting(), self._partial()]
        else:
            parts.append('<p class="missing">No training step has ended yet, so there are no curves.</p>')
        parts += [self._timeline(), self._samples(), self._events(), self._settings()]
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_PAGE}{STYLE}{transcripts.STYLE}</style></head><body><main>\n"
            + "\n".join(parts)
            + f"\n<footer>Written by async-rl report, {clock(datetime.datetime.now().timestamp())}.</footer>"
            "</main></body></html>\n"
        )

    # -- sections -----------------------------------------------------------------------------------------------

    def _header(self) -> str:
        headlines = [headline(run) for run in self._runs]
        if not self._several:
            tiles = "".join(
                f"<div{' class=all' if label == 'Groups' else ''}><dl><dt>{text(label)}</dt>"
                f"<dd>{text(value)}</dd></dl></div>"
                for label, value in headlines[0].items()
            )
            return (
                f'<header><h1>{text(self._names[0])}</h1><p class="good">{text(self._runs[0].path)}</p>'
                f'<div class="tiles">{tiles}</div></header>'
            )
        head = "".join(f"<th>{text(name)}</th>" for name in self._names)
        body = "".join(
            f"<tr><th>{text(label)}</th>{''.join(f'<td>{text(one[label])}</td>' for one in headlines)}</tr>"
            for label in headlines[0]
        )
        return (
            f"<header><h1>{len(headlines)} runs side by side</h1><table><thead><tr><th></th>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></header>"
        )

    def _learning(self) -> str:
        reward, held_out = (
            Curve("reward, sampled", of("reward_mean")),
            Curve("eval", of("eval_reward_mean"), marks=True),
        )
        sets = [Curve(name, of("eval_avg", name), marks=True) for name in self._sets if name != HELD_OUT]
        lengths = [Curve("mean", of("response_tokens_mean")), Curve("longest", of("response_tokens_max"))]
        return _section(
            "Is it learning",
            "Reward rises, and eval, which is on held-out problems and greedy, rises with it. Entropy falls slowly and "
            "not to zero; the gradient norm stays within one order of magnitude. Thin lines are steps, thick ones a "
            "running mean; in long runs a band goes from the smallest to the largest value.",
            [
                self._curves("Reward and eval", "mean reward", [reward, held_out]),
                *([self._curves("Evaluation sets", "mean reward", sets)] if sets else []),
                self._curves("Response length", "tokens", lengths if not self._several else lengths[:1]),
                self._curves("Entropy", "nats", [Curve("entropy", of("entropy"))]),
                self._curves("Gradient norm", "before clipping", [Curve("norm", of("grad_norm"))], log=None),
                self._curves("Loss", "policy loss", [Curve("loss", of("loss"))]),
                self._curves("Learning rate", "", [Curve("learning rate", of("learning_rate"))], zero=True),
            ],
        )

    def _policy(self) -> str:
        on_policy, stale = (
            Curve("staleness 0", kl_size(stale=False)),
            Curve("staleness 1 and more", kl_size(stale=True)),
        )
        differences = [
            Curve("mean", of("on_policy_logprob_abs_diff_mean")),
            Curve("largest", of("on_policy_logprob_abs_diff_max")),
        ]
        ages = sorted({age for run in self._runs for row in run.rows for age in tokens(row)})
        by_age = [Curve(f"staleness {age}", of("ppo_kl_by_staleness", str(age))) for age in ages[:5]]
        split = [
            self._curves("ppo_kl by staleness" + self._suffix(number), "nats", by_age, only=number)
            for number in range(len(self._runs))
        ]
        return _section(
            "Is it still the same policy",
            "Tokens of staleness 0 measure the engine against the trainer: about 1e-7 with replayed routing in float32 "
            "and without a trend. Stale tokens show how far the policy has moved since: larger, but bounded, "
            "with few clipped or extreme tokens and an effective sample size near 1.",
            [
                self._curves("|ppo_kl|, on policy and stale", "nats", [on_policy, stale], log=True),
                *split,
                self._curves("On-policy difference", "|Δ log-prob|, nats", differences, log=True),
                self._curves(
                    "Canary of the weight syncs",
                    "largest |Δ log-prob|, nats",
                    [_plain("sync_canary_logprob_abs_diff")],
                    log=True,
                ),
                self._curves("ppo_kl, k3 estimate", "nats", [_plain("ppo_kl_k3")], log=None),
                self._curves(
                    "Router disagreement",
                    "share of the replayed choices",
                    [_plain("router_disagreement_ratio")],
                    zero=True,
                ),
                self._curves("Clipped tokens", "share", [_plain("clip_fraction")], zero=True),
                self._curves("Effective sample size", "share of the tokens", [_plain("effective_sample_size_ratio")]),
                self._curves(
                    "Extreme tokens", "share with ratio beyond 2", [_plain("extreme_token_fraction")], zero=True
                ),
            ],
        )

    def _staleness(self) -> str:
        drawn: list[str] = []
        for number, run in enumerate(self._runs):
            suffix = self._suffix(number)
            ages = sorted({min(age, _MOST_AGES) for row in run.rows for age in tokens(row)})
            labels = [f"{age}+" if age == _MOST_AGES else str(age) for age in ages]
            per_row = [_grouped(row) for row in run.rows]
            whole = [sum(row.get(age, 0) for row in per_row) for age in ages]
            drawn.append(
                figures.histogram(
                    "Trained tokens by staleness" + suffix,
                    "versions",
                    list(zip(labels, map(float, whole), strict=True)),
                )
            )
            size = max(1, math.ceil(len(per_row) / _HEAT_COLUMNS))
            parts = [(run.rows[i : i + size], per_row[i : i + size]) for i in range(0, len(per_row), size)]
            columns = [[sum(row.get(age, 0) for row in counted) for age in ages] for _, counted in parts]
            shares = [[count / (sum(column) or 1) for count in column] for column in columns]
            steps = [(_step(rows[0]), _step(rows[-1])) for rows, _ in parts]
            rows = [(label, [column[index] for column in shares]) for index, label in enumerate(labels)]
            drawn.append(figures.heat_map("Staleness over the run" + suffix, "versions", steps, rows))
        return _section(
            "Staleness",
            "The mean is about the setting staleness_threshold, and no token is above max_staleness. "
            "A heat map that drifts upwards means that rollout runs ahead of the trainer.",
            drawn,
        )

    def _waiting(self) -> str:
        idle = [Curve("rollout", of("rollout_idle_ratio")), Curve("trainer", of("trainer_idle_ratio"))]
        flow = [Curve("in the queue", of("queue_groups")), Curve("outstanding", of("groups_outstanding"))]
        pushes = [self._sync(number) for number in range(len(self._runs))]
        return _section(
            "Who waited",
            "One side is always at work: one of the two idle shares is near zero, and overlap efficiency is near 1. "
            "A queue that is always full waits for the trainer, one that is always empty for rollout. Weight syncs are "
            "short compared with a step.",
            [
                self._curves("Idle", "share of the step", idle, zero=True),
                self._curves("Groups", "number", flow, zero=True),
                self._curves(
                    "Overlap efficiency", "busier side, share of the time", [_plain("overlap_efficiency")], zero=True
                ),
                self._curves("Wall time of a step", "seconds", [_plain("step_seconds")], log=None, zero=True),
                *pushes,
            ],
        )

    def _partial(self) -> str:
        return _section(
            "Partial rollouts",
            "A weight sync cuts running generations, which are resumed after it. A share above zero shows that long "
            "responses do not delay weight syncs. Many segments show that syncs come faster than responses finish.",
            [
                self._curves(
                    "Cut and resumed", "share of the trajectories", [Curve("partial", partial_share)], zero=True
                ),
                self._curves("Most segments of a trajectory", "segments", [_plain("max_segments")], zero=True),
            ],
        )

    def _timeline(self) -> str:
        return _section(
            "Timeline",
            "A few training steps near the end of the recording. Rollout continues while the trainer updates. It is "
            "paused only for a weight sync, which cuts calls (outlined) that are resumed right after it (dotted "
            "lines).",
            [gantt.timeline(run, "Who did what" + self._suffix(number)) for number, run in enumerate(self._runs)],
        )

    def _samples(self) -> str:
        runs = zip(self._names, self._runs, strict=True)
        return _section(
            "What was sampled",
            "The latest of samples.jsonl: turns, tools, why an agent's rollout forked, where a weight sync cut a turn.",
            [_heading(name, shown=self._several) + transcripts.in_html(run.path) for name, run in runs],
            grid=False,
        )

    def _events(self) -> str:
        parts = [
            _heading(name, shown=self._several) + _event_list(run)
            for name, run in zip(self._names, self._runs, strict=True)
        ]
        good = "Good: checkpoints and evaluations only. One restart now and then is an accident; many point to a fault."
        return _section("Events", good, [f"<div>{part}</div>" for part in parts], grid=False)

    def _settings(self) -> str:
        parts = []
        for name, run in zip(self._names, self._runs, strict=True):
            content = (run.path / runfolder.CONFIG).read_text(encoding="utf-8", errors="replace")
            label = f"config.yaml of {name}" if self._several else "config.yaml"
            parts.append(f"<details><summary>{text(label)}</summary><pre>{text(content)}</pre></details>")
        return _section("Settings", "All settings, defaults included.", parts, grid=False)

    # -- figures ------------------------------------------------------------------------------------------------

    def _suffix(self, number: int) -> str:
        return f": {self._names[number]}" if self._several else ""

    def _curves(
        self,
        title: str,
        unit: str,
        curves: Sequence[Curve],
        *,
        log: bool | None = False,
        zero: bool = False,
        only: int | None = None,
    ) -> str:
        """Draw curves of every run, or of one. Several runs differ in colour, the curves of one run in their dashes."""
        mixed = self._several and only is None
        series = []
        for number, run in enumerate(self._runs):
            if only not in (None, number):
                continue
            xs = [_step(row) for row in run.rows]
            for index, curve in enumerate(curves):
                label = curve.label
                if mixed:
                    label = f"{self._names[number]}, {label}" if len(curves) > 1 else self._names[number]
                ys = [curve.read(row) for row in run.rows]
                colour, dash = (number, index if len(curves) > 1 else number) if mixed else (index, index)
                series.append(Series(label, xs, ys, colour, dash, curve.marks))
        return figures.curves(title, unit, series, log=log, zero=zero)

    def _sync(self, number: int) -> str:
        rows = [row for row in self._runs[number].rows if isinstance(row.get("sync_seconds"), dict)]
        phases = list(dict.fromkeys(str(phase) for row in rows for phase in row["sync_seconds"] if phase != "total"))
        parts = [(phase, [as_number(row["sync_seconds"].get(phase)) or 0.0 for row in rows]) for phase in phases[:6]]
        return figures.stacked(
            "Weight syncs by phase" + self._suffix(number), "seconds", [_step(row) for row in rows], parts
        )


def headline(run: History) -> dict[str, str]:
    """Return the headline figures of a run, from its rows where it has no summary."""
    rows, said = run.rows, run.summary if isinstance(run.summary, dict) else {}
    last = rows[-1] if rows else {}
    ages = [age for row in rows for age, count in tokens(row).items() if count]
    oldest = _first(of("token_staleness", "max")(said), float(max(ages)) if ages else None)
    bound = run.settings.get("async_training")
    bound = bound.get("max_staleness") if isinstance(bound, dict) else None
    wall = _first(of("wall_s")(said), of("elapsed_s")(last))
    overlap = _first(of("overlap_efficiency")(said), of("overlap_efficiency")(last))
    version = _first(of("policy_version")(said), of("policy_version")(last))
    partial = sum(of("partial_rollouts")(row) or 0.0 for row in rows)
    trajectories = sum(of("trajectories")(row) or 0.0 for row in rows)
    how = str(said.get("exit_reason")) if said else "still running" if run.running else "killed, or not over yet"
    return {
        "How it ended": how,
        "Training steps": f"{_step(last) if rows else 0:,.0f} of {run.steps:,}",
        "Wall time": _duration(wall),
        "Policy version": _said(version, "{:,.0f}"),
        "Overlap efficiency": _said(overlap, "{:.2f}"),
        "Eval, first → last": "; ".join(_evals(rows, said)),
        "Largest staleness": _said(oldest, "{:.0f}") + (f" (bound {bound})" if bound is not None else ""),
        "Partial rollouts": _said(partial / trajectories if trajectories else None, "{:.1%}"),
        "Groups": _conservation(said.get("groups")),
    }


def _evals(rows: Sequence[Row], said: dict[str, Any]) -> list[str]:
    """Return the first and the last mean reward of each evaluation set, that of data.eval without its name."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in evals(row).items():
            found.setdefault(name, []).append(value)
    summed_up = said.get("eval_sets")
    names = dict.fromkeys([*found, *(summed_up if isinstance(summed_up, dict) else ())]) or {HELD_OUT: None}
    lines = []
    for name in names:
        keys = ("eval",) if name == HELD_OUT else ("eval_sets", name)
        mean = () if name == HELD_OUT else ("avg", "mean")
        first = _first(of(*keys, "first", *mean)(said), found[name][0] if name in found else None)
        last = _first(of(*keys, "last", *mean)(said), found[name][-1] if name in found else None)
        shown = f"{_said(first, '{:.3f}')} → {_said(last, '{:.3f}')}"
        lines.append(shown if name == HELD_OUT else f"{name} {shown}")
    return lines


def _event_list(run: History) -> str:
    """List the latest events; warnings are kept longer than others."""
    if not run.events:
        return '<p class="missing">The driver has logged nothing.</p>'
    loud = [event for event in run.events if _loudness(event)]
    quiet = [event for event in run.events if not _loudness(event)]
    kept = loud[-_MOST_EVENTS:]
    kept = sorted(kept + quiet[len(quiet) - min(len(quiet), _MOST_EVENTS - len(kept)) :], key=lambda event: event.time)
    left = len(run.events) - len(kept)
    note = f'<p class="missing">{left:,} earlier ones are left out.</p>' if left else ""
    lines = [
        f'<li class="{"loud" if _loudness(event) else ""}"><time>{clock(event.time)}</time>'
        f"{f'<b>{text(_loudness(event))}</b>' if _loudness(event) else ''}{text(event.text)}</li>"
        for event in kept
    ]
    return f'{note}<ul class="events">{"".join(lines)}</ul>'


def _loudness(event: Event) -> str:
    """Return the kind of trouble that the event reports, or an empty string."""
    if str(event.level).lower() not in ("", "debug", "info"):
        return str(event.level)
    # Earlier versions logged prose instead of names.
    return "restart" if event.name in RESTARTS or " died" in event.name else ""


def _section(title: str, good: str, parts: Sequence[str], *, grid: bool = True) -> str:
    inside = f'<div class="figures">{"".join(parts)}</div>' if grid else "".join(parts)
    return f'<section><h2>{text(title)}</h2><p class="good">{text(good)}</p>{inside}</section>'


def _heading(name: str, *, shown: bool) -> str:
    return f"<h3>{text(name)}</h3>" if shown else ""


# -- values of rows -------------------------------------------------------------------------------------------------


def _plain(key: str) -> Curve:
    return Curve(key, of(key))


def _step(row: Row) -> float:
    return as_number(row.get("step")) or 0.0


def _grouped(row: Row) -> dict[int, float]:
    found: dict[int, float] = {}
    for age, count in tokens(row).items():
        found[min(age, _MOST_AGES)] = found.get(min(age, _MOST_AGES), 0.0) + count
    return found


def _first(*values: Number) -> Number:
    return next((value for value in values if value is not None), None)


def _said(value: Number, form: str) -> str:
    return "–" if value is None else form.format(value)


def _conservation(groups: Any) -> str:
    """Write invariant 5, conservation, with the run's numbers."""
    names: tuple[str, ...] = ("issued", "trained", "outstanding", "returned", "failed")
    if isinstance(groups, dict) and groups.get("filtered"):  # missing in runs of earlier releases
        names += ("filtered",)
    counts = [as_number(groups.get(name)) for name in names] if isinstance(groups, dict) else [None]
    if any(count is None for count in counts):
        return "not known before the run has ended by itself"
    issued, *parts = (int(count or 0) for count in counts)
    sum_ = " + ".join(f"{count:,} {name}" for count, name in zip(parts, names[1:], strict=True))
    return f"{issued:,} issued {'=' if issued == sum(parts) else '≠'} {sum_}"


def _duration(seconds: Number) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"
