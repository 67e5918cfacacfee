"""The tiers cover every test, and report what they took."""

import subprocess
import sys

import pytest
from hypothesis import settings

from tests.support import tiers
from tests.support.examples import examples
from tests.support.tiers import ALL_EXAMPLES, ROOT, TIERS, Step, Tier, Timing, describe, read_timings, run


def test_everything_runs_in_test_all():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    steps = [step.command for step in TIERS["test-all"].steps if step.tests]
    assert folders == {argument for command in steps for argument in command if argument.startswith("tests/")}
    assert all("-k" not in command and command.count("-m") == 1 for command in steps), "a step that leaves tests out"


def test_each_tier_has_the_steps_of_the_one_below():
    lint, check, test, everything = (TIERS[name].steps for name in ("lint", "check", "test", "test-all"))
    assert check[: len(lint)] == lint
    assert test[: len(check)] == check
    assert [with_a_quarter(step) for step in everything[: len(check)]] == list(check)
    assert all(with_a_quarter(step) != step for step in everything if step.tests), "of each property all examples"


def with_a_quarter(step):
    """The step without the option that has all examples of a property tried."""
    words = list(step.command)
    if ALL_EXAMPLES[0] in words:
        at = words.index(ALL_EXAMPLES[0])
        assert tuple(words[at : at + 2]) == ALL_EXAMPLES
        del words[at : at + 2]
    return step._replace(command=tuple(words))


def test_a_property_is_tried_with_all_examples_when_asked_and_else_with_a_quarter(tmp_path, monkeypatch):
    assert examples(40) * 100 == 40 * settings.default.max_examples
    (tmp_path / "conftest.py").write_text("from tests.support.examples import register_profiles\nregister_profiles()")
    (tmp_path / "test_it.py").write_text(
        "from hypothesis import settings\n"
        "from tests.support.examples import examples\n"
        "def test_counts(): assert (settings.default.max_examples, examples(40)) == (100, 40)\n"
        "def test_quarter():\n"
        "    settings.load_profile('quarter')\n"
        "    assert (settings.default.max_examples, examples(40)) == (25, 10)\n"
    )
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "_hypothesis_pytestplugin", *ALL_EXAMPLES, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_report_names_the_budget_and_the_twenty_slowest():
    timings = [Timing(index, f"test_{index}") for index in range(30)]
    lines = describe("check", [Timing(10, "mypy"), Timing(20.04, "unit")], timings).splitlines()
    assert lines[0] == "make check: took 30 s of 240 s (within budget)"
    assert lines[1:3] == ["    10.0 s  mypy", "    20.0 s  unit"]
    assert len(lines) == 4 + 20
    assert lines[4] == "    29.0 s  test_29"
    assert lines[-1] == "    10.0 s  test_10"


def test_a_tier_over_its_budget_says_so():
    assert "OVER BUDGET" in describe("check", [Timing(241, "unit")], [])


def test_the_parts_of_a_tier_have_each_file_once(tmp_path):
    for name in "abcde":
        (tmp_path / f"test_{name}.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_addoption, pytest_collection_modifyitems\n"
        "def pytest_configure(config): config.addinivalue_line('markers', 'e2e')"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", str(tmp_path)]
    found = [
        subprocess.run([*command, f"--part={part}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for part in ("1/1", "1/2", "2/2")
    ]
    whole, first, second = ([line for line in each.splitlines() if "::" in line] for each in found)
    assert (len(whole), len(first), len(second)) == (10, 6, 4)
    assert sorted(first + second) == sorted(whole)
    assert "4 deselected" in found[1]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_what_is_no_part_is_refused(part):
    with pytest.raises(ValueError, match=r"no part|unpack|int"):
        tiers.read_part(part)


def test_a_part_has_its_share_of_the_budget():
    assert describe("test-all", [Timing(70 * 60, "all")], [], (2, 2)).startswith(
        "make test-all PART=2/2: took 4200 s of 4200 s (within budget)"
    )


@pytest.mark.parametrize(("first", "code", "ran"), [("raise SystemExit(3)", 3, 1), ("", 0, 2)])
def test_a_tier_ends_at_the_first_step_that_fails(monkeypatch, tmp_path, capsys, first, code, ran):
    steps = (Step("first", (sys.executable, "-c", first)), Step("second", (sys.executable, "-c", "")))
    monkeypatch.setattr(tiers, "RESULTS", tmp_path)
    monkeypatch.setitem(TIERS, "check", Tier(10, steps))
    assert run("check") == code
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + ran


def test_times_are_read_from_the_report_of_pytest(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite><testcase classname="a.b" name="c" time="1.5"/></testsuite></testsuites>')
    assert read_timings(report) == [Timing(1.5, "a.b::c")]
