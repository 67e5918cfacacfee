"""How SGLang's server is started: by which Python, which needs nothing of the run's environment, and on which cores."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from async_rl.rollout.engine.sglang import versions
from async_rl.rollout.engine.sglang.server import core_groups

ROOT = Path(__file__).parents[2]


def environment(tmp_path, **packages):
    """The Python of a virtual environment that has these packages' metadata, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name, version in packages.items():
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    return tmp_path / "venv" / "bin" / "python"


def program(tmp_path, text):
    path = tmp_path / f"python-{len(list(tmp_path.iterdir()))}"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_another_python_that_has_the_right_sglang_is_taken(tmp_path):
    python = environment(tmp_path, sglang=versions.SGLANG_VERSION, nvidia_nccl_cu13="9.9")
    assert versions.fault(python, nccl=False) is None


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ({}, ["has no sglang; install it there"]),
        ({"sglang": "0.5.7"}, ["has sglang 0.5.7", "written for 0.5.23; pip install sglang==0.5.23 there"]),
    ],
)
def test_another_python_without_the_right_sglang_is_refused_in_one_line(tmp_path, packages, words):
    said = versions.fault(environment(tmp_path, **packages), nccl=False)
    assert "\n" not in said
    for word in ["rollout.engine is sglang", "venv/bin/python of rollout.sglang.python", *words]:
        assert word in said


def test_an_nccl_of_another_version_than_the_trainers_is_refused_where_both_would_meet(tmp_path, monkeypatch):
    python = environment(tmp_path, sglang=versions.SGLANG_VERSION, nvidia_nccl_cu13="2.30.7")
    monkeypatch.setattr(versions, "_version", {"nvidia-nccl-cu13": "2.29.7"}.get)
    assert "has NCCL 2.30.7 and the trainer 2.29.7" in versions.fault(python, nccl=True)
    assert versions.fault(python, nccl=False) is None
    monkeypatch.setattr(versions, "_version", {"nvidia-nccl-cu13": "2.30.7"}.get)
    assert versions.fault(python, nccl=True) is None


def test_what_is_no_python_is_refused_in_one_line(tmp_path):
    for python, reason in [
        (tmp_path / "nowhere", "No such file or directory"),
        (tmp_path, "Permission denied"),
        (program(tmp_path, "echo first >&2; echo cannot >&2; exit 3"), "exit code 3: cannot"),
        (program(tmp_path, "echo hello"), "it did not say what it has"),
        (program(tmp_path, 'echo \'{"python": [3, 10], "sglang": "0.5.23"}\''), "is Python 3.10, and the server needs"),
    ]:
        said = versions.fault(python, nccl=False)
        assert reason in said
        assert "rollout.sglang.python" in said
        assert "\n" not in said


def test_each_tensor_parallel_rank_has_cores_on_a_cpu():
    assert core_groups(2, (4, 5, 6, 7, 8)) == "4,6,8|5,7"
    assert core_groups(3, (1, 2)) == "1|2|1,2"
    assert core_groups(2, None).count("|") == 1


def imported(path, seen):
    """The packages that are not ours and not the standard library's, of a module and what it imports of ours."""
    if path in seen:
        return set()
    seen.add(path)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            root = name.partition(".")[0]
            if root == "async_rl":
                module = ROOT / name.replace(".", "/")
                for ours in (module.with_suffix(".py"), module / "__init__.py"):
                    if ours.exists():
                        found |= imported(ours, seen)
            elif root not in sys.stdlib_module_names:
                found.add(root)
    return found


def test_the_server_imports_nothing_that_only_the_runs_environment_has():
    """Of ours, that is; the lock has all that SGLang requires on GPUs."""
    lock = (ROOT / "requirements" / "sglang-gpu.txt").read_text()
    locked = set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))
    for start in ("rollout/engine/sglang/launcher.py", "weights/sglang.py"):
        found = imported(ROOT / "async_rl" / start, set())
        assert "torch" in found
        assert found <= locked, f"{start}: {found - locked}"
    assert imported(ROOT / "async_rl" / "rollout/engine/sglang/versions.py", set()) == set()
