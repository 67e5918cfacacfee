"""Every port that a run opens is in docs/reference/ports.md, and on one host none is open to the network."""

import pytest

from tests.cluster.hosts import HostsError
from tests.support.listeners import Listener, listeners, table, undocumented, unix_sockets
from tests.support.needs import NEEDS_SGLANG
from tests.support.real_run import SCRIPTED

pytestmark = pytest.mark.e2e


def found_on(host) -> list[Listener]:
    return listeners(host.processes(), enter=host.network_command())


def check_host(host, *, joined: bool, spanning: bool = False) -> set[str]:
    """Compare a host's ports with the table; return the processes that listen."""
    found = found_on(host)
    assert "\n".join(undocumented(found, own=host.address, joined=joined, spanning=spanning)) == ""
    sockets = unix_sockets(host.processes(), enter=host.network_command())
    assert any("plasma_store" in path for path in sockets), "the sockets of Ray are seen"
    assert [path for path, is_open in sockets.items() if is_open] == []
    return {port.process for port in found}


@pytest.mark.slow
@pytest.mark.parametrize("engine", [SCRIPTED["rollout__engine"], "vllm", pytest.param("sglang", marks=NEEDS_SGLANG)])
def test_a_run_on_one_host_listens_on_loopback_alone(make_hosts, run_on, engine):
    # The host's name is its address on the network, as on most machines: what asks for the own host gets that.
    (host,) = hosts = make_hosts(1)
    run = run_on(
        hosts,
        join=False,
        rollout__engine=engine,
        trainer__parallel__tp=2,
        trainer__steps=10_000,
        eval__n=1,
    )
    run.wait_for_step(2)
    seen = check_host(host, joined=False)
    expected = {"gcs_server", "raylet", "driver", "QueueProcess", "RolloutActor", "TrainerActor"}
    assert expected | {"vllm": {"EngineCore"}, "sglang": {"sglang"}}.get(engine, set()) <= seen
    assert {port.address for port in found_on(host)} <= {"127.0.0.1", "::1"}
    # Without the token, no process enters: neither one that has none nor one that has another.
    gcs = next(port for port in found_on(host) if port.process == "gcs_server")
    # Not ray.init, which would look for the cluster at the host's address on the network, for minutes.
    code = f"from ray._raylet import GcsClient; GcsClient(address='127.0.0.1:{gcs.port}').get_all_node_info(timeout=30)"
    for env in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        with pytest.raises(HostsError, match=r"(?i)auth|token"):
            host.python(code, env=env)
    run.terminate()
    assert run.wait() == 130, run.output
    run.assert_nothing_left()


def test_the_table_names_each_process_once_per_service():
    rows = [(row.process, row.serves) for row in table()]
    assert len(set(rows)) == len(rows) >= 10
    places = {
        place.strip() for row in table() for cell in (row.one_host, row.several_hosts) for place in cell.split(",")
    }
    assert places <= {"loopback", "all interfaces", "host's address", "none"}
    assert {row.one_host for row in table()} <= {"loopback", "none"}
