"""The test tiers: what each runs, in which order, within which budget.

    python -m tests.support.tiers lint|check|test|test-all [K/N]

With K/N it runs the Kth of N parts of the tests, each with every Nth file. A tier stops at its first step that fails.
At the end it prints the budget, the time of each step, and the twenty slowest tests. A tier over its budget says so and
does not fail: times depend on what else the machine does.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "tiers"
SLOWEST = 20
_SLOW_FILE = re.compile(r"^pytestmark = .*\.(slow|long)\b", re.MULTILINE)


class Step(NamedTuple):
    name: str
    command: tuple[str, ...]
    tests: bool = False


@dataclass(frozen=True)
class Tier:
    """Steps that run one after the other, and the seconds that they may take on two idle cores."""

    budget_s: float
    steps: tuple[Step, ...]


def tests(name: str, *arguments: str) -> Step:
    """Return the step that runs pytest with these arguments."""
    return Step(name, (sys.executable, "-m", "pytest", "-q", *arguments), tests=True)


def program(name: str, *arguments: str) -> Step:
    """Return the step that runs a program of the virtual environment."""
    return Step(" ".join((name, *arguments)), (str(Path(sys.executable).parent / name), *arguments))


LINT = (
    program("ruff", "check", "."),
    program("ruff", "format", "--check", "."),
    program("mypy"),
    program("lint-imports", "--no-cache"),
    Step("plain prose", (sys.executable, "-m", "tests.support.prose")),
)
# Of each property all examples, instead of a quarter: see tests/support/examples.py.
ALL_EXAMPLES = ("--hypothesis-profile", "all")
REAL = ("tests/chaos", "tests/cluster", "tests/integration", "tests/gpu")


def at_a_time(files: int) -> tuple[str, ...]:
    """Return arguments of pytest for so many files at a time, in the order of tests/conftest.py.

    So a long one does not begin last. One file's tests stay in one process, for their module's fixtures.
    """
    return ("-n", str(files), "--dist", "loadfile", "--no-loadscope-reorder")


UNIT = (*at_a_time(2), "tests/unit")


def files_of_slow_tests() -> list[str]:
    """Return the files that have no test for ``make test``. Both processes would import what they do, vLLM among it."""
    found = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _SLOW_FILE.search(path.read_text()))
    return [path.relative_to(ROOT).as_posix() for path in found]


NOT_SLOW = ("-m", "not slow and not long", *(f"--ignore={path}" for path in files_of_slow_tests()))

TIERS = {
    "lint": Tier(60, LINT),
    "check": Tier(4 * 60, (*LINT, tests("unit", *UNIT))),
    "test": Tier(12 * 60, (*LINT, tests("unit", *UNIT), tests("integration", *NOT_SLOW, *at_a_time(2), *REAL))),
    # Runs that are killed and started again wait for half of their time: with two files, a core was idle. It takes
    # long enough that each test is named as it ends (-vv takes -q back), not at the end alone where it failed.
    "test-all": Tier(
        140 * 60,
        (
            *LINT,
            tests("unit", *ALL_EXAMPLES, *UNIT),
            tests("everything else", "-vv", *ALL_EXAMPLES, *at_a_time(3), *REAL),
        ),
    ),
}


class Timing(NamedTuple):
    seconds: float
    name: str


def read_timings(report: Path) -> list[Timing]:
    """Return how long each test of a JUnit report took, with its fixtures."""
    cases = ElementTree.parse(report).iter("testcase")
    return [Timing(float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases]


def read_part(text: str) -> tuple[int, int]:
    """Return K and N of ``K/N``. Raises ValueError."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(f"{text} is no part of {parts}")
    return part, parts


def describe(tier: str, steps: Sequence[Timing], timings: Sequence[Timing], part: tuple[int, int] = (1, 1)) -> str:
    """Return the report of one tier, or a part of it: budget, steps, slowest tests."""
    number, parts = part
    took, budget = sum(step.seconds for step in steps), TIERS[tier].budget_s / parts
    slowest = sorted(timings, reverse=True)[:SLOWEST]
    verdict = "within budget" if took <= budget else "OVER BUDGET"
    which = f" PART={number}/{parts}" * (parts > 1)
    lines = [f"make {tier}{which}: took {took:.0f} s of {budget:.0f} s ({verdict})"]
    lines += [f"{step.seconds:8.1f} s  {step.name}" for step in steps]
    if slowest:
        lines += [f"the {len(slowest)} slowest tests:", *(f"{test.seconds:8.1f} s  {test.name}" for test in slowest)]
    return "\n".join(lines)


def run(tier: str, part: tuple[int, int] = (1, 1)) -> int:
    """Run one tier, or a part of it, and print its report; return the exit code of the step that failed, or 0."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    steps: list[Timing] = []
    timings: list[Timing] = []
    code = 0
    # Hundreds of Python processes would compile the package, and pytest each test, again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for step in TIERS[tier].steps:
        report = RESULTS / f"{tier}-{step.name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)
        began = time.monotonic()
        command = [*step.command, *([f"--junitxml={report}", "--part={}/{}".format(*part)] if step.tests else [])]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        steps.append(Timing(time.monotonic() - began, step.name + (f" (exit code {code})" if code else "")))
        if report.exists():
            timings += read_timings(report)
        if code:
            break
    print(f"\n{describe(tier, steps, timings, part)}", flush=True)
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.support.tiers")
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument("part", nargs="?", type=read_part, default=(1, 1), metavar="K/N")
    arguments = parser.parse_args()
    sys.exit(run(arguments.tier, arguments.part))
