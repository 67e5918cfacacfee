"""The supervisor ends every descendant, whoever dies first and however. Real processes, no Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A driver whose grandchild sits in a session of its own, ignores SIGTERM, and whose parent exits at once: what an agent
# that outlives its daemon looks like.
SCRIPT = """
import os, subprocess, sys, time
from pathlib import Path
from async_rl.runtime.supervisor import supervise

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
    os.rename(sys.argv[1] + "/pids.tmp", sys.argv[1] + "/pids")
    if sys.argv[2] == "raise":
        raise RuntimeError("the body failed")
    if sys.argv[2] == "return":
        return 7
    time.sleep(300)

sys.exit(supervise(body))
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


def gone(pid: int) -> bool:
    """Ended, or at most a zombie that its parent has yet to collect."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(*pids: int) -> None:
    deadline = time.monotonic() + 15
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.05)


@pytest.mark.parametrize(("ending", "code"), [("return", 7), ("raise", 1)])
def test_body_ends_by_itself(started, tmp_path, ending, code):
    supervisor, driver, orphan = start(started, tmp_path, ending)
    _, stderr = supervisor.communicate(timeout=30)
    assert supervisor.returncode == code
    assert (b"the body failed" in stderr) == (ending == "raise")
    assert gone(driver)
    assert gone(orphan)


def test_driver_killed(started, tmp_path):
    supervisor, driver, orphan = start(started, tmp_path, "sleep")
    os.kill(driver, signal.SIGKILL)
    _, stderr = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 128 + signal.SIGKILL
    assert b"SIGKILL" in stderr
    assert gone(orphan)


def test_supervisor_killed(started, tmp_path):
    # The driver gets SIGTERM from the kernel; this body has no handler for it, so it dies without cleaning up. What a
    # real driver does then is tested with the whole pipeline.
    supervisor, driver, orphan = start(started, tmp_path, "sleep")
    supervisor.kill()
    supervisor.communicate(timeout=30)
    try:
        wait_gone(driver)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_sigterm_is_passed_on(started, tmp_path):
    supervisor, driver, orphan = start(started, tmp_path, "sleep")
    supervisor.terminate()
    supervisor.communicate(timeout=30)
    assert supervisor.returncode == 128 + signal.SIGTERM
    assert gone(driver)
    assert gone(orphan)
