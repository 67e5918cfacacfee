"""The pipeline watched by a real Prometheus: every expression of every panel and alert finds something to show."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import promql_parser
import pytest
import yaml

from async_rl.observe import prometheus
from tests.support.alert_rules import FOLDER
from tests.support.prometheus_api import ask
from tests.support.real_run import Run

DASHBOARD = FOLDER.parent / "grafana" / "async_rl.json"
# A minute from the first scrape on, which comes within fifteen seconds: [6h:1m] looks at whole minutes only.
WATCHED_S = 80
VARIABLES = {"$__rate_interval": "60s", "$__interval": "15s", "$__range": "80s", "$window": "60s"}

# Weights as deltas are for sync.backend object_store; no agent here asks the gateway over HTTP.
OF_OTHER_RUNS = re.compile("sync_publi|sync_changed_ratio|gateway_(requests|fields)")

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def substituted(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return re.sub(r"\$\{?(run|replica)(:\w+)?\}?", ".*", expression)


def panels(node):
    for panel in node.get("panels", []):
        yield panel
        yield from panels(panel)


def shown():
    """(where, expression) of every panel and annotation."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in panels(dashboard):
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", substituted(target["expr"])
    for annotation in dashboard["annotations"]["list"]:
        if expression := annotation.get("expr") or annotation.get("target", {}).get("expr"):
            for operand in operands(substituted(expression)):  # what it marks need not have happened
                yield f"annotation {annotation['name']}", operand


def operands(expression):
    """What an alert or a mark compares: a comparison has no series as long as all is well. Nobody waits for hours here,
    so the past that a rule looks at is the present."""
    expression = re.sub(r" offset \d+\w", "", expression)
    parsed = promql_parser.parse(expression)
    while isinstance(parsed, promql_parser.ParenExpr):
        parsed = parsed.expr
    if isinstance(parsed, promql_parser.BinaryExpr) and str(parsed.op) in ("or", "and", "unless", ">", "<", ">=", "<="):
        for side in (parsed.lhs, parsed.rhs):
            if not isinstance(side, promql_parser.NumberLiteral):
                yield from operands(side.prettify())
    else:
        yield expression


def ruled():
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            for expression in operands(rule["expr"]):
                yield f"rule {rule.get('alert') or rule['record']}", expression


@pytest.fixture(scope="module")
def with_ray_metrics():
    """What is started has the packages with which Ray serves its own metrics."""
    # Where launch/setup.sh puts them.
    packages = Path(sys.prefix) / "ray-metrics"
    assert packages.is_dir(), "make setup"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.fixture(scope="module")
def watched(recipe, tmp_path_factory, with_ray_metrics):
    """(the run, the URL of the Prometheus that has watched it for a minute); the run goes on."""
    folder = tmp_path_factory.mktemp("watched")
    settings = {
        "trainer__steps": 100_000,
        "checkpoint__every": 10,
        "eval__every": 5,
        "trainer__optimizer__lr": 1e-6,
        # What only such runs have series of.
        "data__train": "null",
        "data__sources__letters__path": recipe.parent / "train.jsonl",
        "eval__sets__letters__path": recipe.parent / "eval.jsonl",
        "eval__sets__letters__limit": 4,
        "reward__function": "tests.support.user_rewards:in_parts",
        "data__sources__played__path": recipe.parent / "train.jsonl",
        "data__sources__played__agent": "counting",
        "rollout__agents__counting__environment": "tests.support.user_environments:Wordy",
        "rollout__agents__counting__on_error": "skip",
        "eval__sets__played__path": recipe.parent / "eval.jsonl",
        "eval__sets__played__limit": 4,
        "eval__sets__played__agent": "counting",
    }
    run = Run(recipe, folder, **settings)
    try:
        run.wait_for_step(1)
        data = folder / "prometheus"
        with prometheus.running(data, runs=run.folder.parent, rules=FOLDER / "rules.yml", port=19090) as url:
            time.sleep(WATCHED_S)
            assert run.process.poll() is None, run.output
            yield run, url
        run.process.terminate()
        run.wait()
        run.assert_nothing_left()
    finally:
        run.close()


def test_every_process_is_scraped(watched):
    run, url = watched
    targets = ask(url, "targets")["activeTargets"]
    roles = {target["labels"]["role"]: target["health"] for target in targets}
    assert roles == {"pipeline": "up", "rollout": "up", "trainer": "up", "ray": "up"}
    assert {target["labels"]["run"] for target in targets} == {run.folder.name}


def test_every_expression_finds_a_series(watched):
    _, url = watched
    silent = []
    for where, expression in [*shown(), *ruled()]:
        # Over the time watched, as panels ask: not every step has tokens of every staleness.
        now = time.time()
        if OF_OTHER_RUNS.search(expression):
            continue
        if not ask(url, "query_range", query=expression, start=now - WATCHED_S, end=now, step="2s")["result"]:
            silent.append(f"{where}: {expression}")
    assert silent == [], "\n".join(silent)


def test_prometheus_itself_has_loaded_the_alerts_and_none_fires(watched):
    _, url = watched
    groups = ask(url, "rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(list(yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"][0]["rules"]))
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


@pytest.mark.parametrize("process", ["pipeline", "rollout", "trainer"])
def test_what_is_served_keeps_to_the_format(watched, process):
    run, _ = watched
    text = run.metrics(process)
    # vLLM's names have colons, which promtool keeps for rules.
    ours = "".join(line + "\n" for line in text.splitlines() if "vllm:" not in line)
    checked = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert ("vllm:" in text) == (process == "rollout")
