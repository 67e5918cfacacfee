"""The supervisor ends every descendant, whoever dies first and however. Real processes, no Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.processes import over

# A driver whose grandchild sits in a session of its own, ignores SIGTERM, and whose parent exits at once: what an agent
# that outlives its daemon looks like.
SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from async_rl.runtime import supervisor

supervisor._GRACE_S = 0.5  # what the orphan is waited for, at each end

ORPHAN = '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({ready!r}, "w").close()
time.sleep(300)
'''
DAEMON = '''
import subprocess, sys
quiet = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}}
orphan = subprocess.Popen([sys.executable, "-c", {orphan!r}], start_new_session=True, **quiet)
print(orphan.pid)
'''

def body():
    ready = sys.argv[1] + "/ready"
    orphan = ORPHAN.format(ready=ready)
    command = [sys.executable, "-c", DAEMON.format(orphan=orphan)]
    daemon = subprocess.run(command, capture_output=True, text=True, check=True)
    while not os.path.exists(ready):
        time.sleep(0.01)
    Path(sys.argv[1], "pids.tmp").write_text(f"{os.getpid()} {daemon.stdout}")
    if sys.argv[2] != "clean":
        return go_on()
    try:
        return go_on()
    finally:
        time.sleep(0.3)
        Path(sys.argv[1], "cleaned").touch()

def go_on():
    os.rename(sys.argv[1] + "/pids.tmp", sys.argv[1] + "/pids")  # from now on the test may end it
    if sys.argv[2] == "raise":
        raise RuntimeError("the body failed")
    if sys.argv[2] == "return":
        return 7
    if sys.argv[2] == "count":
        got = []
        signal.signal(signal.SIGINT, lambda *_: got.append(1))
        Path(sys.argv[1], "counting").touch()
        while not got:
            time.sleep(0.01)
        time.sleep(0.3)  # a second one would have come by now
        return 40 + len(got)
    time.sleep(300)

sys.exit(supervisor.supervise(body))
"""


@pytest.fixture(autouse=True)
def started():
    """Processes that a test started; ended with all below them if it failed half-way."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            for descendant in psutil.Process(process.pid).children(recursive=True):
                descendant.kill()
            process.kill()
            process.wait()


def start(started, folder: Path, ending: str) -> tuple[subprocess.Popen, int, int]:
    supervisor = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), ending], stderr=subprocess.PIPE)
    started.append(supervisor)
    deadline = time.monotonic() + 30
    while not (folder / "pids").exists():
        assert time.monotonic() < deadline
        assert supervisor.poll() is None
        time.sleep(0.01)
    driver, orphan = map(int, (folder / "pids").read_text().split())
    return supervisor, driver, orphan


def wait_gone(*pids: int) -> None:
    deadline = time.monotonic() + 15
    while not all(over(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if not over(pid)]}"
        time.sleep(0.05)


@pytest.mark.parametrize(("ending", "code"), [("return", 7), ("raise", 1)])
def test_body_ends_by_itself(started, tmp_path, ending, code):
    supervisor, driver, orphan = start(started, tmp_path, ending)
    _, stderr = supervisor.communicate(timeout=30)
    assert supervisor.returncode == code
    assert (b"the body failed" in stderr) == (ending == "raise")
    assert over(driver)
    assert over(orphan)


def test_driver_killed(started, tmp_path):
    supervisor, driver, orphan = start(started, tmp_path, "sleep")
    os.kill(driver, signal.SIGKILL)
    _, stderr = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 128 + signal.SIGKILL
    assert b"SIGKILL" in stderr
    assert over(orphan)


def test_supervisor_killed(started, tmp_path):
    # The driver gets SIGTERM from the kernel.
    supervisor, driver, orphan = start(started, tmp_path, "sleep")
    supervisor.kill()
    supervisor.communicate(timeout=30)
    wait_gone(driver, orphan)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(started, tmp_path, number):
    supervisor, driver, orphan = start(started, tmp_path, "sleep")
    supervisor.send_signal(number)
    supervisor.communicate(timeout=30)
    assert supervisor.returncode == 130
    assert over(driver)
    assert over(orphan)


def test_sigusr2_is_passed_on_and_does_nothing_before_training_begins(started, tmp_path):
    supervisor, driver, orphan = start(started, tmp_path, "sleep")
    supervisor.send_signal(signal.SIGUSR2)
    with pytest.raises(subprocess.TimeoutExpired):
        supervisor.communicate(timeout=0.3)
    assert not over(driver)
    supervisor.terminate()
    supervisor.communicate(timeout=30)
    assert over(orphan)


def test_signals_to_both_at_once_interrupt_the_driver_only_once(started, tmp_path):
    supervisor, driver, orphan = start(started, tmp_path, "clean")
    os.kill(driver, signal.SIGTERM)
    for _ in range(5):
        supervisor.terminate()
        time.sleep(0.01)
    _, stderr = supervisor.communicate(timeout=30)
    assert (supervisor.returncode, stderr) == (130, b"")
    assert (tmp_path / "cleaned").exists()
    assert over(orphan)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_driver_gets_one_sigint_from_the_terminal_and_from_kill(started, tmp_path, terminal):
    ours, theirs = os.openpty()
    script = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + SCRIPT
    command = [sys.executable, "-c", script, str(tmp_path), "count"]
    supervisor = subprocess.Popen(command, stdin=theirs, start_new_session=True)
    started.append(supervisor)
    deadline = time.monotonic() + 30
    while not (tmp_path / "counting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if terminal:
        os.write(ours, b"\x03")
    else:
        supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(30) == 41
    os.close(ours)
    os.close(theirs)
