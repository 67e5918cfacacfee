"""The locks in requirements/ hold what pyproject.toml asks for, agree, and are installed as they say."""

import hashlib
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from async_rl.rollout.engine.sglang.versions import SGLANG_VERSION
from tests.support.stub_programs import ROOT, Programs

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = ROOT / "requirements"
EXTRAS = {
    "cpu.txt": ("cpu", "redis", "data", "math", "loggers", "dev"),
    "gpu.txt": ("gpu", "redis", "data", "math", "loggers", "dev"),
}
# Packages whose version follows from torch's build.
OTHER_ON_GPUS = {"torch", "triton", "apache-tvm-ffi"}


def pins(lock):
    lines = (line.partition("#")[0].strip() for line in (REQUIREMENTS / lock).read_text().splitlines())
    names, versions = zip(*(line.split("==") for line in lines if line), strict=True)
    assert len(set(names)) == len(names)
    return {canonicalize_name(name): Version(version) for name, version in zip(names, versions, strict=True)}


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_has_what_the_project_asks_for(lock):
    pinned, extras = pins(lock), PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(line for extra in EXTRAS[lock] for line in extras[extra])]
    for requirement in map(Requirement, asked):
        found = pinned.get(canonicalize_name(requirement.name))
        assert found is not None, f"{lock} lacks {requirement}"
        assert requirement.specifier.contains(found), f"{lock} has {found} for {requirement}"


def test_gpus_have_the_versions_of_cpus_wherever_torch_does_not_decide():
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name].public != gpu[name].public} <= OTHER_ON_GPUS
    assert gpu["torch"] == Version(cpu["torch"].public)


def test_sglang_on_gpus_is_the_one_that_is_asked_for_everywhere():
    (asked,) = map(Requirement, PROJECT["optional-dependencies"]["sglang"])
    for lock in ("sglang.txt", "sglang-gpu.txt"):
        assert asked.specifier.contains(pins(lock)["sglang"])
    assert str(pins("sglang.txt")["sglang"]) == SGLANG_VERSION


def test_environments_have_the_versions_of_the_run_where_both_have_a_package():
    environments, cpu = pins("environments.txt"), pins("cpu.txt")
    assert {"msgpack", "reasoning-gym"} <= environments.keys()
    assert not {name for name in environments.keys() & cpu.keys() if environments[name] != cpu[name]}


def test_one_core_of_transformer_engine_is_locked_and_it_is_that_of_torchs_cuda():
    gpu = pins("gpu.txt")
    cores = {name for name in gpu if name.startswith("transformer-engine-cu")}
    (cuda,) = {name.rpartition("-cu")[2] for name in gpu if name.startswith("nvidia-nccl-cu")}
    assert cores == {f"transformer-engine-cu{cuda}"}
    assert len({gpu[name] for name in gpu if name.startswith("transformer-engine")}) == 1


def test_the_lock_is_as_it_was_written():
    text = (REQUIREMENTS / "gpu.txt").read_text()
    listed = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    (written,) = re.findall(r"^# sha256 of the lines without a #: (\w+)$", text, re.MULTILINE)
    assert written == hashlib.sha256(listed.encode()).hexdigest()


# -- launch/setup.sh, with a recording Python --

PYTHON = """
for argument; do
    case $argument in
        /dev/fd/*) echo "list with $(grep -c '^transformer-engine-torch==' "$argument") compiled" >>"$STATE/calls" ;;
    esac
done
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout of what set-up reads, with an environment whose Python records its calls."""
    programs = Programs(tmp_path)
    programs.add("python", PYTHON)
    shutil.copytree(REQUIREMENTS, tmp_path / "requirements")
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    programs.cwd = tmp_path
    programs.env["PROGRAMS"] = ""
    return programs


def set_up(checkout, **env):
    return checkout.run("bash", "launch/setup.sh", **env)


def installed(checkout):
    """What pip was asked to install, without the options that every call has."""
    common = "python -m pip install --quiet --disable-pip-version-check --no-deps "
    return [call.removeprefix(common) for call in checkout.calls if call.startswith(common)]


def device(checkout):
    return (Path(checkout.env["VENV"]) / "device").read_text().strip()


def test_set_up_for_cpus(checkout):
    assert set_up(checkout)[0] == 0
    assert installed(checkout)[:2] == ["-r requirements/cpu.txt", "--no-build-isolation --editable ."]
    assert device(checkout) == "cpu"


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.3"])
def test_set_up_for_gpus_compiles_last_and_adds_flash_attn_before_hopper(checkout, capability):
    checkout.add("nvidia-smi", f"printf '12.0\\n{capability}\\n'")
    assert set_up(checkout, DEVICE="cuda")[0] == 0
    assert "list with 0 compiled" in checkout.calls
    compiled = f"--no-build-isolation transformer-engine-torch=={pins('gpu.txt')['transformer-engine-torch']}"
    flash = ["--no-build-isolation -r requirements/gpu-sm80.txt"] if capability == "8.0" else []
    assert installed(checkout)[1 : 3 + len(flash)] == [compiled, *flash, "--no-build-isolation --editable ."]
    assert device(checkout) == "cuda"


def test_a_lock_that_was_edited_by_hand_is_refused_before_anything_is_installed(checkout):
    lock = checkout.cwd / "requirements" / "gpu.txt"
    lock.write_text(lock.read_text().replace("ray==", "ray==9."))
    code, output = set_up(checkout, DEVICE="cuda", COMPUTE_CAPABILITY="9.0")
    assert code == 1
    assert "edited by hand" in output
    assert "launch/lock_gpu.sh" in output
    assert not installed(checkout)


@pytest.mark.parametrize("mark", ["device", ".installed"])
def test_an_environment_of_the_other_kind_is_refused(checkout, mark):
    (Path(checkout.env["VENV"]) / mark).write_text("cpu\n")
    code, output = set_up(checkout, DEVICE="cuda")
    assert code == 1
    assert "an environment for cpu, not for cuda" in output
    assert not installed(checkout)


def test_a_host_without_a_gpu_must_say_which_it_is_set_up_for(checkout):
    checkout.add("nvidia-smi", "exit 9")
    code, output = set_up(checkout, DEVICE="cuda")
    assert code == 1
    assert "set COMPUTE_CAPABILITY" in output


def test_an_unknown_device_is_refused(checkout):
    code, output = set_up(checkout, DEVICE="gpu")
    assert code == 1
    assert "set cpu or cuda" in output
