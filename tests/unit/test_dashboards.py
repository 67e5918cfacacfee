"""The Grafana dashboard: fresh, valid, complete, and nothing in it that is not there."""

import copy
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import yaml

import async_rl
from async_rl.config.loading import leaves
from async_rl.metrics.declared import METRICS
from async_rl.metrics.spec import PREFIX
from async_rl.observe import prometheus

ROOT = Path(async_rl.__file__).parent.parent
FOLDER = ROOT / "dashboards"
ASSETS = prometheus.ASSETS

sys.path.insert(0, str(FOLDER))
import build  # noqa: E402
import panels  # noqa: E402

sys.path.remove(str(FOLDER))

COMMON_LABELS = {"run", "role", "replica", "instance", "job"}
VLLM_LABELS = {"model_name", "engine"}
RAY_LABELS = {"Component", "State"}
VARIABLES = {"$__interval": "15s", "$window": "1m", "$run": "demo", "$replica": ".*"}


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(build.PATH.read_text())


@pytest.fixture(scope="module")
def drawn(dashboard):
    """Panels that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def targets(drawn):
    return [(panel["title"], target) for panel in drawn for target in panel["targets"]]


def expressions(dashboard):
    """(where, expression) of every query: panels, annotations, variables."""
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]
    found += [(mark["name"], mark["target"]["expr"]) for mark in dashboard["annotations"]["list"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, _ = label_values(variable)
            found.append((variable["name"], series))
    return found


def label_values(variable):
    return re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()


def parsed(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"unknown variable: {expression}"
    return promql_parser.parse(expression)


def nodes(node):
    """The tree of an expression, flat."""
    yield node
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    for child in (*children, *getattr(node, "args", ())):
        if child is not None:
            yield from nodes(child)


def selectors(node):
    return [found for found in nodes(node) if isinstance(found, promql_parser.VectorSelector)]


def grouping(node):
    """Labels that aggregations and matchings name."""
    for found in nodes(node):
        modifier = getattr(found, "modifier", None)
        if isinstance(modifier, promql_parser.AggModifier):
            yield from modifier.labels
        elif modifier is not None and modifier.matching is not None:
            yield from modifier.matching.labels


def labels_of(name):
    """Labels that the series of this name have."""
    if name.startswith(("vllm:", "sglang:")):
        return COMMON_LABELS | VLLM_LABELS
    if name.startswith("ray_"):
        return COMMON_LABELS | RAY_LABELS
    if name.startswith("process_"):
        return COMMON_LABELS
    declared = name.removeprefix(PREFIX)
    histogram = re.fullmatch(r"(.*)_(bucket|sum|count)", declared)
    if histogram is not None and histogram[1] in METRICS and METRICS[histogram[1]].kind == "histogram":
        bounds = {"le"} if histogram[2] == "bucket" else set()
        return COMMON_LABELS | bounds | set(METRICS[histogram[1]].labels)
    assert declared in METRICS, f"{name} is not declared in async_rl/metrics/declared.py"
    assert METRICS[declared].kind != "histogram", f"{name} is a histogram: _bucket, _sum or _count"
    return COMMON_LABELS | set(METRICS[declared].labels)


def test_the_committed_file_is_fresh():
    assert build.PATH.read_text() == build.render(), "python dashboards/build.py"
    assert build.render() == build.render()


def test_check_says_when_it_is_not(tmp_path, monkeypatch, capsys):
    assert build.main(["--check"]) == 0
    monkeypatch.setattr(build, "PATH", tmp_path / "async_rl.json")
    assert build.main(["--check"]) == 1
    assert "python dashboards/build.py" in capsys.readouterr().err
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    assert build.main(["--chekc"]) == 2


def test_queries_name_series_and_labels_that_exist(dashboard):
    for where, expression in expressions(dashboard):
        tree = parsed(expression)
        named = [(selector, labels_of(selector.name)) for selector in selectors(tree)]
        assert named, f"{where}: no series in {expression}"
        for selector, labels in named:
            used = {matcher.name for matcher in selector.matchers.matchers}
            assert used <= labels, f"{where}: {selector.name} has no label {used - labels}"
        known = set.union(*(labels for _, labels in named))
        assert set(grouping(tree)) <= known, f"{where}: {expression}"


def test_every_query_is_filtered_by_run(dashboard):
    for where, expression in expressions(dashboard):
        if where != "run":  # the variable itself, which lists them
            for selector in selectors(
                promql_parser.parse(expression.replace("$window", "1m").replace("$__interval", "1m"))
            ):
                filters = [str(matcher.value) for matcher in selector.matchers.matchers if matcher.name == "run"]
                assert filters == ["$run"], f"{where}: {expression}"


def test_legends_name_labels_that_the_result_has(dashboard, drawn):
    for title, target in targets(drawn):
        tree = parsed(target["expr"])
        kept = set(grouping(tree)) or set.union(*(labels_of(selector.name) for selector in selectors(tree)))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, f"{title}: {target['legendFormat']}"
    for mark in dashboard["annotations"]["list"]:
        kept = set.union(*(labels_of(selector.name) for selector in selectors(parsed(mark["target"]["expr"]))))
        assert set(re.findall(r"{{(\w+)}}", mark["titleFormat"])) <= kept


def test_runs_can_be_laid_over_each_other(drawn):
    for title, target in targets(drawn):
        panel = next(panel for panel in drawn if panel["title"] == title)
        assert "{{run}}" in target["legendFormat"] or panel.get("repeat") == "run", title


@pytest.mark.parametrize("name", METRICS)
def test_every_declared_metric_is_shown(name, drawn):
    series = {selector.name for _, target in targets(drawn) for selector in selectors(parsed(target["expr"]))}
    suffixes = ("_bucket", "_sum", "_count") if METRICS[name].kind == "histogram" else ("",)
    assert any(PREFIX + name + suffix in series for suffix in suffixes), "show it in dashboards/panels"


def test_what_sglang_is_asked_for_is_what_it_counts(drawn):
    spec = importlib.util.find_spec("sglang")
    if spec is None:
        pytest.skip("requirements/sglang.txt is not installed")
    source = (Path(spec.origin).parent / "srt" / "observability" / "metrics_collector.py").read_text()
    counted = set(re.findall(r'name="(sglang:\w+)"', source))
    series = {selector.name for _, target in targets(drawn) for selector in selectors(parsed(target["expr"]))}
    asked = {name for name in series if name.startswith("sglang:")}
    assert len(asked) == 6
    assert asked <= counted


def test_what_vllm_is_asked_for_is_what_it_counts(drawn):
    spec = importlib.util.find_spec("vllm")
    source = (Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py").read_text()
    series = {selector.name for _, target in targets(drawn) for selector in selectors(parsed(target["expr"]))}
    asked = {name for name in series if name.startswith("vllm:")}
    assert asked
    # Counters get their suffix from the client library.
    assert not [name for name in asked if f'"{name.removesuffix("_total")}"' not in source]


def test_phases_are_those_of_the_training_loop():
    texts = [path.read_text() for path in (ROOT / "async_rl" / "driver").glob("*.py")]
    said = {phase for text in texts for phase in re.findall(r'monitor\.phase\("(\w+)"', text)}
    assert {phase for phase, _, _ in panels.PHASES} == said


def test_every_panel_explains_itself(drawn):
    keys = {key for key, _ in leaves()}
    for panel in drawn:
        for part in ("**Good:**", "**Turn:**"):
            assert part in panel["description"], panel["title"]
        quoted = re.findall(r"`([^`]+)`", panel["description"])
        assert quoted, f"{panel['title']}: no flag to turn"
        assert set(quoted) <= keys, f"{panel['title']}: no such setting: {set(quoted) - keys}"
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_titles_and_ids_are_unique(dashboard):
    for key in ("title", "id"):
        values = [panel[key] for panel in dashboard["panels"]]
        assert len(values) == len(set(values))
        assert all(values)
    for panel in dashboard["panels"]:
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(letters) == len(set(letters))


def test_panels_lie_side_by_side(dashboard):
    places = [(panel["title"], panel["gridPos"]) for panel in dashboard["panels"]]
    for title, place in places:
        assert place["x"] >= 0, title
        assert place["x"] + place["w"] <= 24, title
        assert place["w"] > 0, title
        assert place["h"] > 0, title
    for (one, a), (other, b) in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, f"{one} and {other}"


def test_every_band_is_full():
    for row in panels.ROWS:
        for band in row.bands:
            columns = [(entry,) if isinstance(entry, panels.Panel) else entry for entry in band]
            assert sum(column[0].width for column in columns) == 24, row.title
            assert len({sum(panel.height for panel in column) for column in columns}) == 1, row.title
            assert all(len({panel.width for panel in column}) == 1 for column in columns), row.title


def test_the_data_source_is_the_variable_everywhere(dashboard):
    def sources(node):
        if isinstance(node, dict):
            if "datasource" in node:
                yield node["datasource"]
            node = list(node.values())
        for child in node if isinstance(node, list) else ():
            yield from sources(child)

    found = list(sources(dashboard))
    assert len(found) > len(dashboard["panels"])
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in found)
    first = dashboard["templating"]["list"][0]
    assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")


def test_on_policy_and_stale_tokens_are_told_apart(drawn):
    panel = next(panel for panel in drawn if panel["title"] == "ppo_kl by token staleness")
    assert all(
        panel["gridPos"]["w"] * panel["gridPos"]["h"] >= other["gridPos"]["w"] * other["gridPos"]["h"]
        for other in drawn
        if other["type"] == "timeseries"
    )
    assert panel["fieldConfig"]["defaults"]["custom"]["axisCenteredZero"]
    colours = [change["properties"][0]["value"]["fixedColor"] for change in panel["fieldConfig"]["overrides"]]
    assert len(set(colours)) == len(panel["targets"]) == 3


def test_shares_begin_at_zero(drawn):
    for panel in drawn:
        defaults = panel["fieldConfig"]["defaults"]
        if defaults["unit"] == "percentunit" and panel["title"] != "Work of the costliest rank":
            assert defaults["min"] == 0, panel["title"]


def test_provisioning_finds_what_compose_mounts():
    compose = yaml.safe_load((ASSETS / "compose.yaml").read_text())
    services = compose["services"]
    mounts = {
        service: dict(volume.split(":")[:2] for volume in services[service]["volumes"] if "$" not in volume)
        for service in services
    }
    [provider] = yaml.safe_load((ASSETS / "provisioning/dashboards/async_rl.yaml").read_text())["providers"]
    folder = {inside: outside for outside, inside in mounts["grafana"].items()}[provider["options"]["path"]]
    assert (ASSETS / folder).resolve() == build.PATH.parent
    [source] = yaml.safe_load((ASSETS / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    listens = next(word for word in services["prometheus"]["command"] if "listen-address" in word)
    assert source["url"].removeprefix("http://") == listens.partition("=")[2]
    assert source["jsonData"]["timeInterval"] == f"{prometheus.SCRAPE_S}s"
    inside = prometheus.settings(Path("/runs"), rules=Path("/etc/prometheus/rules.yml"))
    assert yaml.safe_load((ASSETS / "prometheus/prometheus.yml").read_text()) == yaml.safe_load(inside)
    assert listens.partition("=")[2].startswith("127.0.0.1:")
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert not service.get("ports")
        binds = [volume for volume in service["volumes"] if volume.startswith((".", "$"))]
        assert all(volume.endswith(":ro") for volume in binds)


def panel_of(dashboard, kind):
    return next(panel for panel in dashboard["panels"] if panel["type"] == kind)


# What a loose schema lets through: each must be an error.
FAULTS = {
    "query_key": lambda it: panel_of(it, "timeseries")["targets"][0].update(legendformat=""),
    "query_value": lambda it: panel_of(it, "heatmap")["targets"][0].update(format="heat"),
    "query_without_expr": lambda it: panel_of(it, "stat")["targets"][0].pop("expr"),
    "option_key": lambda it: panel_of(it, "stat")["options"].update(colourMode="value"),
    "option_value": lambda it: panel_of(it, "timeseries")["options"]["legend"].update(displayMode="tabel"),
    "custom_key": lambda it: panel_of(it, "timeseries")["fieldConfig"]["defaults"]["custom"].update(linewidth=2),
    "field_key": lambda it: panel_of(it, "state-timeline")["fieldConfig"]["defaults"].update(units="s"),
    "kind_of_panel": lambda it: panel_of(it, "stat").update(type="stats"),
    "annotation_key": lambda it: it["annotations"]["list"][0]["target"].update(exp=""),
    "variable_key": lambda it: it["templating"]["list"][1].update(includeall=True),
    "dashboard_key": lambda it: it.update(graphTooltips=1),
}


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed, which fetches Grafana's types")
def test_grafanas_own_types_accept_it_and_nothing_misspelled(dashboard, tmp_path):
    def validate(*files):
        script = [str(FOLDER / "validate.sh"), *map(str, files)]
        return subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)

    sound = validate()
    assert sound.returncode == 0, sound.stdout + sound.stderr
    for name, spoil in FAULTS.items():
        spoilt = copy.deepcopy(dashboard)
        spoil(spoilt)
        (tmp_path / f"{name}.json").write_text(json.dumps(spoilt))
    verdict = validate(*tmp_path.glob("*.json"))
    assert verdict.returncode != 0
    assert set(re.findall(r"^check_(\w+)\.ts\(", verdict.stdout, re.M)) == set(FAULTS), verdict.stdout + verdict.stderr
