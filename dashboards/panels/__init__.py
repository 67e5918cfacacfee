"""The contents of the dashboard: rows of panels with their queries, units and advice. Pure data; ``build`` draws it.

In a query, ``{`` opens the label filters of a metric and is always written, even where it holds none: ``build`` puts
the filter by ``$run`` into each, so that no panel ever mixes in a run that was not chosen. ``$window`` is the time over
which rates are taken; the reader chooses it, because a training step takes 50 ms here and ten minutes elsewhere.

A query with one value per run has the run in its legend, so that two runs can be compared in one panel.
"""

from .engines import ENGINES
from .health import HEALTH
from .learning import LEARNING
from .marks import MARKS, Mark
from .panel import Band, Panel, Query, Row
from .partial import PARTIAL
from .same_policy import SAME_POLICY
from .waiting import PHASES, WAITING

ROWS = (LEARNING, SAME_POLICY, WAITING, PARTIAL, ENGINES, HEALTH)

__all__ = ["MARKS", "PHASES", "ROWS", "Band", "Mark", "Panel", "Query", "Row"]
