"""The house as docs describe it: few rooms, and policy that is pure.

The borders between the rooms are import-linter contracts in pyproject.toml; ``make lint`` checks them.
"""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "async_rl"

MOST_ROOMS = 17
LOOSE_FILES = {"cli.py", "types.py", "errors.py"}

# The one list of what is pure: policy and data, which can be property-tested and simulated in virtual time. A pure
# module decides from its arguments alone. It knows no actor, no engine, no clock, no thread and no file, and imports no
# module of this package that does.
PURE = {
    "async_rl.config.agent_checks",
    "async_rl.config.checks",
    "async_rl.config.input_checks",
    "async_rl.config.memory_checks",
    "async_rl.config.pass_through",
    "async_rl.config.inputs",
    "async_rl.config.rollouts",
    "async_rl.config.schema",
    "async_rl.config.training",
    "async_rl.data.chat_turns",
    "async_rl.data.messages",
    "async_rl.data.prompts",
    "async_rl.doctor.check",
    "async_rl.doctor.cluster",
    "async_rl.doctor.host_report",
    "async_rl.doctor.placement",
    "async_rl.driver.fleet",
    "async_rl.driver.checkpoint_schedule",
    "async_rl.driver.core_shares",
    "async_rl.driver.shares",
    "async_rl.driver.watchdog",
    "async_rl.errors",
    "async_rl.metrics.declared",
    "async_rl.metrics.events",
    "async_rl.metrics.evaluation",
    "async_rl.metrics.records",
    "async_rl.metrics.spec",
    "async_rl.metrics.summary",
    "async_rl.models.routing",
    "async_rl.observe.rows",
    "async_rl.queue.broker",
    "async_rl.queue.broker_state",
    "async_rl.queue.codec",
    "async_rl.queue.records",
    "async_rl.queue.staleness",
    "async_rl.queue.wire",
    "async_rl.rollout.engine.interface",
    "async_rl.rollout.engine.vllm.ranks",
    "async_rl.rollout.filters",
    "async_rl.rollout.gateway.requests",
    "async_rl.rollout.in_flight",
    "async_rl.rollout.branches",
    "async_rl.rollout.conversation",
    "async_rl.rollout.environments.named",
    "async_rl.rollout.environments.progress",
    "async_rl.rollout.environments.tools",
    "async_rl.rollout.environments.values",
    "async_rl.rollout.parked",
    "async_rl.rollout.partial",
    "async_rl.rollout.rewards.adapters",
    "async_rl.rollout.rewards.named",
    "async_rl.rollout.rewards.overlong",
    "async_rl.rollout.rewards.score",
    "async_rl.rollout.rewards.signature",
    "async_rl.rollout.rewards.text",
    "async_rl.rollout.routing_policies",
    "async_rl.rollout.saved_session",
    "async_rl.rollout.admission",
    "async_rl.rollout.prefixes",
    "async_rl.rollout.session",
    "async_rl.rollout.stop_strings",
    "async_rl.rollout.stops",
    "async_rl.rollout.user_values",
    "async_rl.runtime.cores",
    "async_rl.trainer.logprobs",
    "async_rl.trainer.packing",
    "async_rl.trainer.parallel",
    "async_rl.trainer.rejection",
    "async_rl.trainer.samples",
    "async_rl.types",
    "async_rl.weights.buckets",
    "async_rl.weights.canary",
    "async_rl.weights.delta",
    "async_rl.weights.fingerprint",
}
# Modules that call themselves pure and are not yet, each with the import that keeps it from it.
NOT_YET = {
    "async_rl.models.names": "writes the tables of expert weights to files",
    "async_rl.trainer.advantages": "async_rl.rollout.user_function",
    "async_rl.trainer.losses": "async_rl.rollout.user_function",
    "async_rl.trainer.policy_sums": "async_rl.trainer.losses",
    "async_rl.trainer.report": "async_rl.trainer.megatron.optimizer",
    "async_rl.trainer.step": "time",
}
# What a pure module may import of this package although it is not pure itself, and why.
ALLOWED = {
    "async_rl.config.fields": "asks os whether a string can be a path, and reads nothing",
    "async_rl.config.operation": "reads RAY_ADDRESS, which stands for a setting",
}
IMPURE_LIBRARIES = {
    *("asyncio", "concurrent", "datetime", "fcntl", "logging", "mmap", "multiprocessing", "os", "psutil", "random"),
    *("select", "shutil", "signal", "socket", "structlog", "subprocess", "tempfile", "threading", "time", "urllib"),
    *("megatron", "prometheus_client", "ray", "redis", "transformers", "vllm"),
}
FILE_METHODS = {
    *("exists", "glob", "is_dir", "is_file", "iterdir", "mkdir", "open", "read_bytes", "read_text", "rglob", "stat"),
    *("touch", "unlink", "write_bytes", "write_text"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.Module) -> set[str]:
    """Return every module that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in TREES else node.module for name in names}
    return found


def impurities(tree: ast.Module) -> list[str]:
    """Return what keeps a module from being pure, in words."""
    found = [f"imports {name}" for name in imported(tree) if name.partition(".")[0] in IMPURE_LIBRARIES]
    ours = {name for name in imported(tree) if name in TREES and (ast.get_docstring(TREES[name]) or "")}
    found += [f"imports {name}, which is not pure" for name in ours - PURE - ALLOWED.keys()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            method = getattr(node.func, "attr", None)
            if name in ("open", "print") or method in FILE_METHODS:
                found.append(f"line {node.lineno} calls {name or method}")
    return sorted(found)


def test_the_package_has_few_rooms():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert files == LOOSE_FILES
    assert len(folders | files) <= MOST_ROOMS


@pytest.mark.parametrize("name", sorted(PURE))
def test_a_pure_module_touches_nothing_but_its_arguments(name):
    assert name in TREES, "the list of pure modules names a file that does not exist"
    assert impurities(TREES[name]) == []


def test_a_module_that_calls_itself_pure_is_in_the_list():
    claims = {
        name
        for name, tree in TREES.items()
        if re.search(r"(^|\. )Pure[.:]|, pure:", ast.get_docstring(tree) or "", re.M)
    }
    assert claims - PURE - NOT_YET.keys() == set()


@pytest.mark.parametrize(
    ("source", "impurity"),
    [
        ("import time", "imports time"),
        ("def now():\n    from time import monotonic", "imports time"),
        ("from vllm.v1 import engine", "imports vllm.v1"),
        ("from async_rl.queue import client", "imports async_rl.queue.client, which is not pure"),
        ("def read(path):\n    return path.read_text()", "line 2 calls read_text"),
        ("with open('x') as file: pass", "line 1 calls open"),
    ],
)
def test_an_impure_module_is_noticed(source, impurity):
    assert impurities(ast.parse(source)) == [impurity]


def test_mypy_is_strict_on_every_pure_module():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    relaxed = {
        name for override in mypy["overrides"] if not override.get("strict", True) for name in override["module"]
    }
    assert mypy["strict"]
    assert relaxed & PURE == set()
