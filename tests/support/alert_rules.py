"""The alerts that the rules of async_rl.observe raise for metrics that do not change, as promtool finds them."""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from async_rl.metrics.exporter import Metrics
from async_rl.metrics.spec import series_key
from async_rl.observe import prometheus

FOLDER = prometheus.ASSETS / "prometheus"
LABELS = {"run": "r", "role": "pipeline", "replica": "0"}


def promtool(*arguments):
    assert shutil.which("promtool"), "promtool is not installed: apt install prometheus"
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)


def scraped(metrics: Metrics) -> dict[str, float]:
    """What this process serves of ours: series -> value."""
    return {
        series_key(sample.name, sample.labels | LABELS): sample.value
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
        if sample.name.startswith("async_rl_")
    }


def assert_firing(metrics: Metrics, alerts: set[str], *, before: Mapping[str, float] = MappingProxyType({})) -> None:
    """What this process serves, scraped for ten minutes, raises these alerts and no others. before: what it served
    in the first five of them, where that was something else."""
    series = [
        {"series": name, "values": f"{before.get(name, value):.12f}x30 {value:.12f}x30"}
        for name, value in scraped(metrics).items()
    ]
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)]
    query = {"expr": 'count(ALERTS{alertstate="firing"}) by (alertname)', "eval_time": "10m", "exp_samples": expected}
    tree = {
        "rule_files": [str(FOLDER / "rules.yml")],
        "evaluation_interval": "10s",
        "tests": [{"interval": "10s", "input_series": series, "promql_expr_test": [query]}],
    }
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "test.yml"
        path.write_text(yaml.safe_dump(tree))
        tested = promtool("test", "rules", path)
    assert tested.returncode == 0, tested.stdout + tested.stderr
