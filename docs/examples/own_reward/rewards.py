"""A reward of your own: pairs of neighbours in order, and no letter lost or invented."""

from __future__ import annotations

import itertools
from collections import Counter

from async_rl.types import Prompt


def ordered_pairs(prompt: Prompt, response: str) -> float:
    """Return the share of neighbouring letters that are in order, times the share of the prompt's letters kept."""
    asked, given = Counter(prompt.fields["answer"]), Counter(response)
    kept = (asked & given).total() / max((asked | given).total(), 1)
    pairs = list(itertools.pairwise(response))
    ordered = sum(a <= b for a, b in pairs) / len(pairs) if pairs else 0.0
    return kept * ordered
