"""Events that are drawn over every panel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """Events drawn over every panel. The query gives a value above zero where one is."""

    name: str
    expr: str
    text: str
    colour: str


# A counter or version now against one step of the query ago: changes() over a step would miss those between the last
# sample of one step and the first of the next.
MARKS = (
    Mark(
        "Pushes",
        'async_rl_policy_version{role="pipeline"} - async_rl_policy_version{role="pipeline"} offset $__interval > 0',
        "{{run}}: new weights",
        "blue",
    ),
    Mark(
        "Checkpoints",
        "async_rl_checkpoints_total{} - async_rl_checkpoints_total{} offset $__interval > 0",
        "{{run}}: checkpoint",
        "purple",
    ),
    Mark(
        "Restarts",
        "async_rl_process_restarts_total{} - async_rl_process_restarts_total{} offset $__interval > 0",
        "{{run}}: {{process}} restarted",
        "red",
    ),
)
