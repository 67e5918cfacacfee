"""A wheel has everything that the package needs at run time; nothing is read from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("async_rl", "configs", "pyproject.toml", "README.md", "LICENSE")
ASSETS = """
import sys
from pathlib import Path
import yaml
import async_rl
from async_rl.observe import prometheus, serve

unpacked = Path(sys.argv[1])
assert Path(async_rl.__file__).is_relative_to(unpacked), async_rl.__file__
home = serve._provision(unpacked / "grafana", "http://127.0.0.1:9090")
tree = yaml.safe_load((home / "provisioning" / "dashboards" / "async_rl.yaml").read_text())
dashboards = Path(tree["providers"][0]["options"]["path"])
assert dashboards.is_relative_to(unpacked), dashboards
assert (dashboards / "async_rl.json").is_file()
for name in ("compose.yaml", "rules.yml", "prometheus.yml", "prometheus.yaml"):
    assert list(prometheus.ASSETS.rglob(name)), name
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build folder of an earlier build would add files that are no longer there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", target]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *map(str, options), str(source)], check=True)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked, *arguments):
    """What Python prints with the wheel before the checkout on its path, in another folder."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=unpacked,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_alerts_dashboard_and_provisioning_are_found(unpacked):
    run(unpacked, "-c", ASSETS, unpacked)


def test_the_command_line_works(unpacked):
    assert "--port" in run(unpacked, "-m", "async_rl.cli", "observe", "--help")


def test_the_reference_of_the_metrics_is_the_one_in_the_docs(unpacked):
    page = run(unpacked, "-m", "async_rl.metrics.reference")
    assert page == (ROOT / "docs" / "reference" / "metrics.md").read_text()


def test_types_and_recipes_are_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "async_rl/py.typed" in names
    recipes = {name.partition("/data/share/async_rl/")[2] for name in names} - {""}
    assert recipes == {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
