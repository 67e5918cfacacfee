"""The alert rules: promtool's own tests of them, each of which can fail, and texts that name what exists."""

import re
from pathlib import Path

import pytest
import yaml

from async_rl.config.loading import leaves
from async_rl.metrics import publish
from async_rl.metrics.declared import METRICS
from async_rl.metrics.exporter import Metrics
from async_rl.metrics.records import TokenAgreement
from async_rl.metrics.spec import PREFIX
from tests.support.alert_rules import FOLDER, assert_firing, promtool
from tests.support.step_records import step_record

(GROUP,) = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
CASES = Path(__file__).parents[2] / "dashboards" / "rules_test.yml"
ALERTS = {rule["alert"]: rule for rule in GROUP["rules"] if "alert" in rule}


def test_rules_and_settings_are_sound():
    checked = promtool("check", "rules", FOLDER / "rules.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    # Its rules are mounted elsewhere, which --syntax-only leaves alone.
    checked = promtool("check", "config", "--syntax-only", FOLDER / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_fault_raises_the_alert_that_names_it_and_no_other():
    tested = promtool("test", "rules", CASES)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("mismatch", "alerts"),
    [(1e-7, set()), (5.3e-3, set()), (0.15, {"OnPolicyMismatch"})],
    ids=["sound", "bfloat16", "fault"],
)
def test_what_a_run_publishes_is_what_the_rules_read(mismatch, alerts):
    agreement = TokenAgreement(tokens=100, kl=mismatch / 10, abs_mean=mismatch, abs_max=4 * mismatch)
    with Metrics("pipeline", run="r") as metrics:
        publish.publish_start(metrics)
        publish.publish_step(metrics, step_record(agreement=agreement, agreement_by_staleness={0: agreement}))
        assert_firing(metrics, alerts)


@pytest.mark.parametrize("alert", ALERTS)
def test_the_tests_notice_when_an_alert_is_missing(alert, tmp_path):
    rules = [rule for rule in GROUP["rules"] if rule.get("alert") != alert]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [GROUP | {"rules": rules}]}))
    cases = yaml.safe_load(CASES.read_text()) | {"rule_files": ["rules.yml"]}
    # The other cases cannot notice it, and together they take seconds.
    cases["tests"] = [case for case in cases["tests"] if alert in yaml.safe_dump(case)]
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(cases))
    tested = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert tested.returncode != 0
    assert alert in tested.stdout + tested.stderr


@pytest.mark.parametrize("rule", GROUP["rules"], ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_reads_metrics_that_exist(rule):
    for name in re.findall(rf"{PREFIX}(\w+)", rule["expr"]):
        assert name in METRICS
    for name in re.findall(r"run:[\w:]+", rule["expr"]):
        assert any(other.get("record") == name for other in GROUP["rules"])


@pytest.mark.parametrize("alert", ALERTS.values(), ids=list(ALERTS))
def test_an_alert_says_what_to_check_and_names_settings_that_exist(alert):
    text = alert["annotations"]["description"]
    assert "Check first" in text or "Lower" in text
    keys = {key for key, _ in leaves()}
    sections = "|".join({key.partition(".")[0] for key in keys if "." in key})
    for word in re.findall(rf"\b(?:{sections})\.[a-z_.]*[a-z_]", text):
        assert word in keys or word.endswith((".jsonl", ".log")), word
