"""What the dashboard shows: rows of panels with their queries, units and advice. Pure data, which ``build`` draws.

In a query, ``{`` opens the label filters of a metric and is always written, even where it holds none: ``build`` puts
the filter by ``$run`` into each, so that no panel ever mixes in a run that was not chosen. ``$window`` is the time that
rates are taken over; the reader chooses it, because a training step takes 50 ms here and ten minutes elsewhere.

What has one value per run carries the run in its legend, so that two runs can be laid over each other.
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
