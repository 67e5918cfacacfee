"""The stand-in for Transformer Engine takes the arguments that the version in pyproject.toml takes."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from tests.support import te_signatures

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "support" / "stand_ins" / "transformer_engine"
TABLE = json.loads(te_signatures.TABLE.read_text())


def definitions():
    """Every function and class of the stand-in, by name."""
    trees = (ast.parse(path.read_text()) for path in sorted(STAND_IN.rglob("*.py")))
    return {node.name: node for tree in trees for node in tree.body if hasattr(node, "name")}


def find(name):
    first, *method = name.split(".")
    known = definitions()
    node = known[first]
    if not method:
        return node
    own = [child for child in node.body if getattr(child, "name", None) == method[0]]
    return own[0] if own else find(f"{node.bases[0].id}.{method[0]}")


@pytest.mark.parametrize("called", TABLE["arguments"])
def test_it_takes_the_arguments_of_the_real_one(called):
    found = te_signatures.arguments(find(called.split(":")[1]))
    assert found == TABLE["arguments"][called]


def test_nothing_is_there_that_the_real_one_lacks():
    assert not definitions().keys() & set(te_signatures.ABSENT.values())


def test_the_version_is_the_one_that_users_install():
    """Fails when the extra's pin moves: record the table again, and follow what changed in the modules."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = (re.search(r"==(.+)", line)[1] for line in extras["gpu"] if line.startswith("transformer-engine"))
    stated = re.search(r'__version__ = "(.+)"', (STAND_IN / "__init__.py").read_text())[1]
    assert pinned == stated == TABLE["version"]
