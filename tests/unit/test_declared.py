"""Every metric is emitted, and documented as it is declared."""

import ast
from pathlib import Path

import pytest

import async_rl
from async_rl.metrics import reference
from async_rl.metrics.declared import METRICS

PACKAGE = Path(async_rl.__file__).parent


def strings_in_the_code():
    """Every string literal of the package but for the declarations; docstrings do not count."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "declared.py":
            found |= {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    return found


@pytest.fixture(scope="module")
def named():
    return strings_in_the_code()


@pytest.mark.parametrize("name", METRICS)
def test_what_is_declared_is_emitted_somewhere(name, named):
    if METRICS[name].read is None:  # publish_step emits the others
        assert name in named, "it is never emitted: emit it, or remove it from async_rl/metrics/declared.py"


def test_the_reference_is_fresh():
    page = PACKAGE.parent / "docs" / "reference" / "metrics.md"
    assert page.read_text() == reference.page(), "make generate"
