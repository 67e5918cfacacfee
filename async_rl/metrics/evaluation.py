"""The results of one evaluation: avg@k and pass@k with their uncertainty, over a set and by source. Pure.

Problems are drawn, responses to one problem are alike: a problem's k responses are one observation, the mean over them,
and the standard error is that of these observations. Knows neither prompts nor engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# 95 % of a normal distribution lie within so many standard deviations of its mean.
_Z95 = 1.96

EvalLine = Mapping[str, Any]
"""The results of one set at one policy version, a line of evals.jsonl; ``eval_line`` makes it."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The scored responses to one problem."""

    rewards: tuple[float, ...]
    tokens: tuple[int, ...]
    """Length of each response."""
    truncated: int
    """Responses that ended at rollout.max_response_tokens."""
    source: str | None = None
    """Where the problem is from; None if its row does not say."""
    metrics: tuple[Mapping[str, float], ...] = ()
    """What agents returned beside the reward, of each rollout; () for responses."""


@dataclass(frozen=True, slots=True)
class EvalRules:
    """What a set's results are made of."""

    k: int
    """Responses per problem."""
    pass_sizes: tuple[int, ...]
    """The k of each pass@k, at most ``k``."""
    pass_at: float
    """Reward from which on a response passes."""


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Return the chance that one of ``k`` responses passes, of ``n`` of which ``passed`` did: unbiased for k <= n.

    1 - C(n - passed, k) / C(n, k), as in Chen et al., 2021 (arXiv 2107.03374).
    """
    if not 0 <= passed <= n or not 0 < k <= n:
        raise ValueError(f"pass@{k} of {passed} out of {n} responses")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean over problems, its standard error and 95 % interval; these are None for a single problem."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return {"mean": mean, "stderr": None, "low": None, "high": None}
    stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return {"mean": mean, "stderr": stderr, "low": mean - _Z95 * stderr, "high": mean + _Z95 * stderr}


def results(answered: Sequence[Answered], rules: EvalRules) -> dict[str, Any]:
    """Return the results over these problems, each of which has ``rules.k`` responses."""
    passed = [sum(reward >= rules.pass_at for reward in each.rewards) for each in answered]
    responses = sum(len(each.rewards) for each in answered)
    named: dict[str, list[float]] = {}
    for metrics in (metrics for each in answered for metrics in each.metrics):
        for name, value in metrics.items():
            named.setdefault(name, []).append(value)
    return {
        "problems": len(answered),
        "avg": estimate([math.fsum(each.rewards) / len(each.rewards) for each in answered]),
        "pass": {
            str(k): estimate(
                [pass_at_k(len(each.rewards), count, k) for each, count in zip(answered, passed, strict=True)]
            )
            for k in rules.pass_sizes
        },
        "truncated": sum(each.truncated for each in answered) / responses,
        "response_tokens_mean": sum(sum(each.tokens) for each in answered) / responses,
        **({"metrics": {name: math.fsum(named[name]) / len(named[name]) for name in sorted(named)}} if named else {}),
    }


def eval_line(name: str, answered: Sequence[Answered], rules: EvalRules, *, failed: int = 0) -> dict[str, Any]:
    """Return the results of a set, and of each source in it. ``failed``: problems that have no result."""
    by_source: dict[str, list[Answered]] = {}
    for each in answered:
        if each.source is not None:
            by_source.setdefault(each.source, []).append(each)
    line = {"set": name, "k": rules.k, "pass_at": rules.pass_at, "failed": failed, **results(answered, rules)}
    if by_source:
        line["sources"] = {source: results(by_source[source], rules) for source in sorted(by_source)}
    return line


def largest_pass(line: EvalLine) -> float:
    """Return the mean of a set's pass@k of the largest k."""
    mean: float = line["pass"][max(line["pass"], key=int)]["mean"]
    return mean
