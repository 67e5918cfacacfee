"""What the hosts of these tests are: apart, connected, and gone afterwards. No Ray."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import INSIDE, ROOT, HostsError, wait_until
from tests.support.real_run import CLEAN_WITHIN_S, assert_no_shared_memory_left

SERVE = """
import socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
while True:
    with server.accept()[0] as taken:
        while data := taken.recv(2**20):
            pass
        taken.sendall(b"done")
"""
SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[3])) as there:
    there.sendall(bytes(int(sys.argv[2])))
    there.shutdown(socket.SHUT_WR)
    assert there.recv(4) == b"done"
print(time.monotonic() - began)
"""


def serve(host) -> subprocess.Popen:
    server = host.popen([sys.executable, "-c", SERVE, host.address], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    return server


def send(host, to, nbytes: int = 1, timeout_s: float = 20) -> float:
    """Return the seconds that it took."""
    return float(host.python(SEND, to.address, str(nbytes), str(timeout_s)))


def reaches(host, to) -> bool:
    """Whether a connection comes about. Not always at once: a search for the host may be under way, in vain."""
    try:
        return send(host, to) < 20
    except HostsError:
        return False


def processes_of(hosts) -> list[int]:
    return [process.pid for host in hosts for process in host.processes()]


def gone(pids) -> bool:
    return not any(Path(f"/proc/{pid}").exists() and "State:\tZ" not in _status(pid) for pid in pids)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "State:\tZ"


def test_hosts_reach_each_other_and_have_name_memory_and_folder_of_their_own(make_hosts, tmp_path):
    memory, here = set(os.listdir("/dev/shm")), (socket.gethostname(), Path("/etc/hosts").read_text())
    one, two, three = make_hosts(3)
    servers = [serve(host) for host in (two, three)]
    for host in (two, three):
        assert send(one, host) < 20
    for host in (one, two, three):
        seen = host.python(
            "import os, socket; open('/dev/shm/mine', 'w'); open('file', 'w');"
            "name = socket.gethostname();"
            "print(name, socket.gethostbyname(name), os.getcwd(), os.listdir('/dev/shm'))"
        )
        assert seen.split(maxsplit=3)[:3] == [host.name, host.address, str(INSIDE / "work")]
        assert seen.strip().endswith("['mine']")
        assert (host.folder / "work" / "file").exists()
        # What is not a host's own is shared, under the same path.
        assert host.python(f"import os; print(os.path.exists({str(tmp_path)!r}))") == "True\n"
    assert here == (socket.gethostname(), Path("/etc/hosts").read_text())
    assert_no_shared_memory_left(memory, os.getpid(), time.monotonic() + CLEAN_WITHIN_S)
    assert all(server.poll() is None for server in servers)


def test_a_limited_link_is_slow_in_both_directions_and_its_bytes_are_counted(make_hosts):
    one, two = make_hosts(2)
    serve(one), serve(two)
    nbytes = 4_000_000
    sent, received = two.link.traffic
    unlimited = send(one, two, nbytes)
    assert two.link.traffic[1] - received == pytest.approx(nbytes, rel=0.03)
    assert two.link.traffic[0] - sent < nbytes / 10
    two.link.limit(mbit=32)  # 4 MB/s
    for begin, end in ((one, two), (two, one)):
        took = send(begin, end, nbytes)
        assert 0.8 < took < 10
        assert took > unlimited
    two.link.unlimit()
    assert send(one, two, nbytes) < 0.8 * took


@pytest.mark.slow
def test_a_delayed_link_delays(make_hosts):
    one, two = make_hosts(2)
    serve(two)
    try:
        two.link.limit(mbit=1000, delay_ms=100)
    except HostsError as error:
        pytest.skip(f"this kernel has no netem: {error}")
    assert send(one, two) > 0.4  # two round trips


def test_a_link_that_is_cut_carries_nothing_until_it_heals(make_hosts):
    one, two, three = make_hosts(3)
    serve(two), serve(three)
    assert send(one, two) < 20
    two.link.cut()
    with pytest.raises(HostsError, match="timed out"):
        send(one, two, timeout_s=1)
    assert send(one, three) < 20, "the other hosts still reach each other"
    two.link.heal()
    assert send(one, two) < 20


@pytest.mark.parametrize("silently", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_host_is_dead_and_comes_back_with_its_folder_and_address(make_hosts, silently):
    one, two = make_hosts(2)
    server = serve(two)
    listening = two.processes(SERVE[:20])
    assert len(listening) >= 1
    (two.folder / "work" / "kept").touch()
    two.python("open('/dev/shm/lost', 'w')")
    pids = processes_of([two])
    two.kill(silently=silently)
    assert server.wait(10) != 0
    assert gone(pids)
    assert not two.on
    assert two.processes() == []
    with pytest.raises(HostsError, match=r"timed out|No route"):
        send(one, two, timeout_s=1)
    two.boot()
    serve(two)
    wait_until(lambda: reaches(one, two), 20, "the host that came back is reached")
    assert two.python("import os; print(os.listdir('/dev/shm'), os.listdir('.'))") == "[] ['kept']\n"


def test_nothing_is_left_of_hosts(make_hosts, tmp_path):
    before = _of_the_machine()
    hosts = make_hosts(2)
    hosts[0].popen(["sleep", "1000"])
    hosts[1].run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 &"])  # its parent has ended
    wait_until(lambda: all(host.processes("sleep 1000") for host in hosts), 10, "both processes run")
    pids = processes_of(hosts)
    hosts.close()
    assert gone(pids)
    assert _of_the_machine() == before


@pytest.mark.slow
def test_two_sets_of_hosts_with_the_same_addresses_do_not_meet(make_hosts, tmp_path):
    (one, two), (other, _) = make_hosts(2), make_hosts(2, folder=tmp_path / "other")
    assert two.address == other.address.replace(".1", ".2")
    serve(two)
    assert send(one, two) < 20
    with pytest.raises(HostsError, match="refused"):
        send(other, two)


MAKE = """
import sys, time
from pathlib import Path
from tests.cluster.hosts import Hosts
hosts = Hosts(2, Path(sys.argv[1]))
hosts[0].popen(["sleep", "1000"])
time.sleep(0.3)
print(*(process.pid for host in hosts for process in host.processes()), hosts._switch.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_nothing_is_left_of_hosts_whose_maker_was_killed(make_hosts, tmp_path, signum):
    before = _of_the_machine()
    maker = subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in maker.stdout.readline().split()]
    assert len(pids) >= 6
    assert not gone(pids[:1])
    maker.send_signal(signum)
    maker.wait(10)
    wait_until(lambda: gone(pids), 10, "every process of the hosts has ended")
    assert _of_the_machine() == before


def _of_the_machine() -> tuple[str, str, list[str]]:
    """Links, mounts and names of network namespaces of this machine, none of which a host may change."""
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    named = Path("/run/netns")
    time.sleep(0.1)
    return links, Path("/proc/mounts").read_text(), sorted(map(str, named.iterdir())) if named.exists() else []
