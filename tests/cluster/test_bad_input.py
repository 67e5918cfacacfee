"""What is wrong with a run over hosts is said in one line, before anything of the run is started."""

import os
import shutil

import pytest

from tests.cluster.hosts import INSIDE
from tests.cluster.test_ports import SCRIPTED

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETTINGS = {"rollout__engine": SCRIPTED, "trainer__steps": 10_000, "eval__n": 1}


@pytest.fixture
def hosts(make_hosts):
    hosts = make_hosts(2)
    hosts.start_ray()
    return hosts


def refused(run, *words: str) -> None:
    """Check that the run ended with one line that has these words, and that nothing of it was started."""
    assert run.wait() == 1, run.output
    lines = [line for line in run.output.splitlines() if line.startswith("async-rl: ")]
    assert len(lines) == 1, run.output
    assert all(word in lines[0] for word in words), lines
    assert "Traceback" not in run.output
    assert not (run.folder / "logs" / "rollout-0.jsonl").exists()
    run.assert_nothing_left()


def test_a_wrong_token_an_unknown_interface_and_a_name_in_use_are_each_named(hosts, run_on, tmp_path):
    (tmp_path / "wrong").write_text("f" * 64)
    folders = {name: tmp_path / name for name in ("a", "b", "c", "d")}
    for folder in folders.values():
        folder.mkdir()
    wrong = run_on(hosts, folder=folders["a"], env={"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, **SETTINGS)
    refused(wrong, hosts.address, "token")
    unknown = run_on(hosts, folder=folders["b"], cluster__interface="eth9", trainer__parallel__dp=2, **SETTINGS)
    refused(unknown, "cluster.interface", "eth9", "host-")
    first = run_on(hosts, folder=folders["c"], **SETTINGS)
    first.wait_for_step(1)
    second = run_on(hosts, folder=folders["d"], driver=1, **SETTINGS)
    assert second.wait() == 1, second.output
    assert "a run named run is under way" in second.output
    first.wait_for_more(2)
    first.terminate()
    assert first.wait() == 130, first.output
    first.assert_nothing_left()


def test_a_model_that_only_one_host_has_is_named_with_the_host_that_lacks_it(hosts, run_on, tiny_model):
    shutil.copytree(tiny_model, hosts[0].folder / "work" / "model")
    assert os.listdir(hosts[1].folder / "work") == []
    run = run_on(hosts, model__path=str(INSIDE / "work" / "model"), **SETTINGS)
    refused(run, "model.path", hosts[1].address)
