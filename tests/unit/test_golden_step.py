"""A training step's row in metrics.jsonl and its series in /metrics, against values recorded once and kept.

tests/unit/golden/ holds them: dashboards, alerts and scripts of users read these names and values, so they do not
change by accident.
"""

import json
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from async_rl.metrics.exporter import Metrics
from async_rl.metrics.publish import publish_start, publish_step, step_row
from async_rl.metrics.records import SyncRecord, TokenAgreement
from tests.support.step_records import step_record

GOLDEN = Path(__file__).parent / "golden"
SYNC = SyncRecord(policy_version=3, seconds=0.5, phases={"pause": 0.1, "transfer": 0.4}, canary=1e-6)
NOTHING = TokenAgreement(tokens=0, kl=0.0, abs_mean=None, abs_max=None)
RECORDS = {
    "plain": {},
    "all": {
        "step": 7,
        "policy_version": 3,
        "eval_reward_mean": 0.5,
        "router_fallback_rows": 5,
        "extra_positions": 12,
        "padding_ratio": 0.125,
        "rank_cost_ratio": 1.25,
        "tokens_masked": {"stale": 4, "not_sampled": 6},
        "skipped": {"non_finite": 1},
        "last_sync": SYNC,
        "replica_versions": {0: 3, 1: 2},
    },
    "none": {
        "agreement": NOTHING,
        "agreement_by_staleness": {3: NOTHING},
        "agreement_by_resume_position": {},
        "agreement_by_engine": {},
        "temperature": None,
        "router_disagreement": None,
        "response_tokens": (),
        "segments": (),
        "interruptions": (),
    },
}


def exposed(metrics: Metrics) -> list[str]:
    """What this process serves of ours, without the help texts and in a fixed order."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return sorted(line for line in lines if "async_rl_" in line and not line.startswith("# HELP"))


@pytest.mark.parametrize("name", RECORDS)
def test_row(name):
    golden = json.loads((GOLDEN / f"row_{name}.json").read_text())
    assert json.loads(json.dumps(step_row(step_record(**RECORDS[name])))) == golden


def test_exposition():
    metrics = Metrics("pipeline")
    publish_start(metrics)
    for name, record in RECORDS.items():
        publish_step(metrics, step_record(**record))
        assert exposed(metrics) == (GOLDEN / f"metrics_{name}.txt").read_text().splitlines(), name
