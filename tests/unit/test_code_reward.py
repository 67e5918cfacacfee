"""Code that a model wrote: each limit against a program that would break it, and what the reward makes of the outcome.

Every test runs twice, with the namespaces that the kernel grants and without; after each, no process and no file of a
sandbox may be left.
"""

import asyncio
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import pytest

from async_rl.config.inputs import RewardSection
from async_rl.doctor import inputs
from async_rl.errors import RewardError
from async_rl.rollout.rewards import code as code_reward
from async_rl.rollout.rewards.code import Limits, isolation, limit_sandboxes, passes_tests, run_python, unit_tests
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.rewards.score import FinishedResponse, Score
from async_rl.types import Prompt

SHORT = Limits(wall_s=0.2)
UNSHARE = code_reward._NAMESPACES
UNKNOWN_SYSCALL = 10_000


def sandboxed(worker: int | None = None) -> list[psutil.Process]:
    """The processes of sandboxes that this process, or ``worker``, started; forked ones have the same command line."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "import ctypes, os, resource" in " ".join(command) and str(worker or os.getpid()) in command:
            found.append(process)
    return found


async def until(condition) -> None:
    """Wait for the condition; the bound is there only so that a failing test ends."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True, params=["namespaces", "no namespaces"])
def sandboxes(request, tmp_path, monkeypatch):
    """Sandboxes with the namespaces that there are, and without: a flag that no kernel knows makes it refuse them."""
    folder = tmp_path / "sandboxes"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    if request.param == "no namespaces":
        monkeypatch.setattr(code_reward, "_NAMESPACES", 1)
    yield
    limit_sandboxes(None)
    assert sandboxed() == []
    assert list(folder.iterdir()) == []


@pytest.fixture
async def apart(sandboxes):
    """Whether sandboxes are in a user namespace of their own."""
    outcome = await run_python("import os; print(os.readlink('/proc/self/ns/user'))")
    return outcome.stdout.strip() != os.readlink("/proc/self/ns/user")


@pytest.fixture
def only_apart(apart):
    if not apart:
        pytest.skip("promised with namespaces only")


@pytest.fixture
def landlock():
    """Whether the kernel has Landlock: its version, or -1."""
    return ctypes.CDLL(None).syscall(code_reward._LANDLOCK, None, 0, 1) > 0


@pytest.fixture
def only_hidden(landlock):
    if not landlock:
        pytest.skip("this kernel has no Landlock (5.13 or newer, listed in /sys/kernel/security/lsm)")


def prompt(**fields) -> Prompt:
    return Prompt("0-17", 17, "Add.", np.array([1], np.int32), fields)


async def test_a_program_reads_stdin_and_prints():
    outcome = await run_python("import sys\nprint(input()[::-1])\nprint('e', file=sys.stderr)", "abc\n")
    assert outcome == code_reward.Outcome("ok", 0, "cba\n", "e\n")


@pytest.mark.parametrize(
    ("code", "returncode", "stderr"),
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", 3, ""),
        ("import sys; sys.exit('so it is')", 1, "so it is"),
        ("if:", 1, "SyntaxError"),
        ("print(1)\0", 1, "null bytes"),
        ("print('\ud800')", 1, "SyntaxError"),
        ("print(chr(0xd800))", 1, "UnicodeEncodeError"),
        ("import numpy", 1, "ModuleNotFoundError"),
        ("os.getpid()", 1, "NameError"),
    ],
)
async def test_a_program_that_fails(code, returncode, stderr):
    outcome = await run_python(code)
    assert (outcome.status, outcome.returncode) == ("error", returncode)
    assert stderr in outcome.stderr


async def test_a_program_that_crashes():
    outcome = await run_python("import ctypes; ctypes.string_at(0)")
    assert (outcome.status, outcome.returncode) == ("killed", -signal.SIGSEGV)


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("print('é漢😀')", "é漢😀\n"),
        ("import sys; sys.stdout.buffer.write(b'a\\xffb')", "a\ufffdb"),
        ("print(chr(0xdcff))", "\ufffd\n"),
        ("print(ascii(input()))", "'\\udced\\udca0\\udc80\\xe9'\n"),
    ],
)
async def test_text_beyond_ascii(code, stdout):
    assert (await run_python(code, "\ud800é\n")).stdout == stdout


@pytest.mark.parametrize("code", ["while True: pass", "import time\nprint('a', flush=True)\ntime.sleep(60)"])
async def test_wall_time(code):
    outcome = await run_python(code, limits=SHORT)
    assert outcome.status == "timeout"
    assert outcome.stdout == ("a\n" if "print" in code else "")


async def test_cpu_time():
    outcome = await run_python("while True: pass", limits=Limits(wall_s=600, cpu_s=0.1))
    assert (outcome.status, outcome.returncode) == ("timeout", -signal.SIGXCPU)


async def test_memory():
    allocate = "kept = bytearray(2 * 2**30)"
    assert (await run_python(allocate)).status == "memory"
    caught = await run_python(f"try: {allocate}\nexcept MemoryError: print('none')")
    assert (caught.status, caught.stdout) == ("ok", "none\n")


async def test_size_of_a_file():
    code = "import os\ntry: open('f', 'wb').write(bytes(10**8))\nfinally: print(os.path.getsize('f'))"
    outcome = await run_python(code, limits=Limits(file_bytes=1000))
    assert (outcome.status, outcome.stdout) == ("error", "1000\n")
    assert "File too large" in outcome.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_output_is_kept_up_to_the_limit_and_the_program_goes_on(stream):
    code = f"import sys\nfor _ in range(200): sys.{stream}.write('x' * 10_000)\nsys.exit(7)"
    outcome = await run_python(code, limits=Limits(wall_s=60, output_bytes=1000))
    assert outcome.returncode == 7
    assert getattr(outcome, stream) == "x" * 1000
    assert outcome.truncated


async def test_both_streams_share_the_limit():
    code = "import os, time\nos.write(1, b'a' * 700)\ntime.sleep(0.2)\nos.write(2, b'b' * 700)"
    outcome = await run_python(code, limits=Limits(output_bytes=1000))
    assert len(outcome.stdout) + len(outcome.stderr) == 1000


async def test_endless_output():
    outcome = await run_python("while True: print('x' * 1000)", limits=SHORT)
    assert outcome.status == "timeout"
    assert len(outcome.stdout) == SHORT.output_bytes


@pytest.mark.parametrize("code", ["print(len(input()))", "print(10**7)"])
async def test_much_input_read_or_not(code):
    outcome = await run_python(code, "x" * 10**7, Limits(wall_s=60))
    assert (outcome.status, outcome.stdout) == ("ok", "10000000\n")


@pytest.mark.parametrize(
    "code",
    ["import os; os.fork()", "import os; os.system('true') and 1 / 0", "from _thread import *; start_new(id, ())"],
)
async def test_no_processes_and_threads(code):
    assert (await run_python(code)).status == "error"


FORKS = """
import os, signal, time
for _ in range(3):
    if not os.fork():
        os.close(1), os.close(2)
        time.sleep(60)
"""


@pytest.mark.parametrize(("then", "status"), [("", "ok"), ("time.sleep(60)", "timeout"), ("while 1: pass", "timeout")])
async def test_children_that_would_outlive_the_program(then, status):
    outcome = await run_python(FORKS + then, limits=Limits(wall_s=0.2 if then else 60, processes=3))
    assert (outcome.status, outcome.stderr) == (status, "")


@pytest.mark.parametrize("then", ["", "time.sleep(60)"])
async def test_children_that_leave_group_session_and_parent(then):
    leave = FORKS.replace("os.close(1)", "os.setsid(), os.fork() and os._exit(0), os.close(1)")
    outcome = await run_python(leave + then, limits=Limits(wall_s=0.2 if then else 60, processes=9))
    assert (outcome.status, outcome.stderr) == ("timeout" if then else "ok", "")


@pytest.mark.usefixtures("only_apart")
async def test_number_of_processes():
    outcome = await run_python(FORKS, limits=Limits(processes=2))
    assert outcome.status == "error"
    assert "BlockingIOError" in outcome.stderr


async def test_the_environment_is_not_inherited(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    outcome = await run_python("import os; print(sorted(os.environ))")
    assert outcome.stdout == "['LANG', 'PATH']\n"


@pytest.mark.usefixtures("only_apart")
async def test_the_environment_of_the_worker_cannot_be_read():
    outcome = await run_python(f"open('/proc/{os.getpid()}/environ', 'rb').read()")
    assert "PermissionError" in outcome.stderr


async def test_open_files_are_not_inherited():
    with socket.socket() as inherited:
        inherited.set_inheritable(True)
        outcome = await run_python(f"import os; os.fstat({inherited.fileno()})")
    assert "Bad file descriptor" in outcome.stderr


async def test_number_of_open_files():
    outcome = await run_python("kept = [open('program.py') for _ in range(100)]")
    assert "Too many open files" in outcome.stderr


async def test_limits_and_rights_cannot_be_raised():
    code = (
        "import resource as r\n"
        "for name in 'AS', 'CPU', 'FSIZE', 'NPROC', 'NOFILE', 'CORE':\n"
        "    try: r.setrlimit(getattr(r, 'RLIMIT_' + name), (2**40, 2**40)); print('raised', name)\n"
        "    except ValueError: pass\n"
        "for line in open('/proc/self/status'):\n"
        "    if line.startswith(('CapEff', 'NoNewPrivs')): print(line.split()[1])"
    )
    assert (await run_python(code)).stdout == "0000000000000000\n1\n"


@pytest.mark.usefixtures("only_apart")
async def test_other_files_are_read_only(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("as it was")
    for change in (f"open({str(mine)!r}, 'w')", f"import os; os.remove({str(mine)!r})", "open('/tmp/theirs', 'w')"):
        outcome = await run_python(f"open('own', 'w').write('a')\nprint('written')\n{change}")
        assert outcome.stdout == "written\n"
        assert "Read-only file system" in outcome.stderr
    assert mine.read_text() == "as it was"


@pytest.mark.usefixtures("only_apart")
async def test_the_worker_cannot_be_signalled():
    outcome = await run_python(f"import os; print(os.getppid()); os.kill({os.getpid()}, 0)")
    assert outcome.stdout == "0\n"
    assert "ProcessLookupError" in outcome.stderr


async def test_the_supervisor_is_in_another_group():
    outcome = await run_python("import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.killpg(0, 15)\nprint('on')")
    assert (outcome.status, outcome.stdout) == ("ok", "on\n")


async def test_a_supervisor_that_was_stopped_is_killed(monkeypatch):
    monkeypatch.setattr(code_reward, "END_S", 0.2)
    code = "import os, time\nif os.getppid(): os.kill(os.getppid(), 19)\ntime.sleep(60)"
    assert (await run_python(code, limits=SHORT)).status == "timeout"


@pytest.mark.usefixtures("only_apart")
async def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = await run_python(f"import socket; socket.create_connection({server.getsockname()!r}, 1)")
    assert "Network is unreachable" in outcome.stderr


async def test_the_folder_goes_whatever_is_in_it():
    code = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.chmod('a', 0)\nprint(os.getcwd())"
    outcome = await run_python(code)
    assert outcome.stdout.startswith(tempfile.tempdir)
    assert not os.path.exists(outcome.stdout.strip())


@pytest.mark.parametrize(
    "before", ["", "import ctypes; ctypes.CDLL(None).prctl(1, 0)  # no signal when the parent dies"]
)
async def test_cancelling_ends_the_program(tmp_path, before):
    code = f"import signal, time\n{before}\nsignal.signal(15, signal.SIG_IGN)\nopen('started', 'w')\ntime.sleep(60)"
    running = asyncio.create_task(run_python(code, limits=Limits(wall_s=60)))
    await until(lambda: list(tmp_path.glob("sandboxes/*/started")))
    assert len(sandboxed()) == 2
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sandboxed() == []


async def test_cancelled_before_the_worker_has_the_process_in_hand_no_code_runs(tmp_path):
    code = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0)\nopen('started', 'w')\ntime.sleep(3)"
    running = asyncio.create_task(run_python(code))
    await asyncio.sleep(0)
    time.sleep(0.3)  # The event loop is late: the process has started, and asyncio does not know yet.
    before, started = sandboxed(), list(tmp_path.glob("sandboxes/*/started"))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(before) == 1
    assert started == sandboxed() == []


async def test_the_program_ends_with_the_worker(tmp_path):
    code = "open('started', 'w'); import time; time.sleep(60)"
    worker_code = (
        "import asyncio, tempfile; from async_rl.rollout.rewards import code as c\n"
        f"tempfile.tempdir, c._NAMESPACES = {tempfile.tempdir!r}, {code_reward._NAMESPACES}\n"
        f"asyncio.run(c.run_python({code!r}, limits=c.Limits(wall_s=60)))"
    )
    with subprocess.Popen([sys.executable, "-c", worker_code]) as worker:
        try:
            await until(lambda: list(tmp_path.glob("sandboxes/*/started")))
            assert len(sandboxed(worker.pid)) == 2
        finally:
            worker.kill()
    await until(lambda: sandboxed(worker.pid) == [])
    for folder in tmp_path.glob("sandboxes/*"):
        shutil.rmtree(folder)  # Nobody is left to do it.


async def test_as_many_programs_run_at_one_time_as_there_are_workers():
    RewardRunner(RewardSection(function="async_rl.rollout.rewards.code:unit_tests", workers=1))
    code = "import time; print(time.monotonic()); time.sleep(0.1); print(time.monotonic())"
    outcomes = await asyncio.gather(*(run_python(code) for _ in range(3)))
    spans = sorted([float(t) for t in outcome.stdout.split()] for outcome in outcomes)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("bootstrap", "message"),
    [("raise OSError('no such luck')", "no such luck"), ("import time; time.sleep(20)", "did not start within 0.3 s")],
)
async def test_a_sandbox_that_fails_is_not_taken_for_a_program_that_does(monkeypatch, bootstrap, message):
    monkeypatch.setattr(code_reward, "_BOOTSTRAP", f"{bootstrap}\n{code_reward._BOOTSTRAP}")
    monkeypatch.setattr(code_reward, "STARTUP_S", 0.3 if "sleep" in bootstrap else 60.0)
    with pytest.raises(RewardError, match=f"(?s)cannot set up a sandbox.*{message}"):
        await run_python("print(1)")


@pytest.mark.parametrize("hidden", [True, False])
async def test_isolation_tells_what_was_found(apart, landlock, monkeypatch, hidden):
    if not hidden:
        monkeypatch.setattr(code_reward, "_LANDLOCK", UNKNOWN_SYSCALL)
    hidden = hidden and landlock
    isolation.cache_clear()
    assert ("no network" in isolation(), code_reward.HIDDEN in isolation()) == (apart, hidden)
    assert ("files read-only" in isolation()) == (apart and not hidden)
    assert isolation().endswith("cannot start processes")
    isolation.cache_clear()


@pytest.mark.parametrize("hidden", [True, False])
async def test_doctor_says_whether_the_dataset_can_be_read(landlock, monkeypatch, hidden):
    if not hidden:
        monkeypatch.setattr(code_reward, "_LANDLOCK", UNKNOWN_SYSCALL)
    isolation.cache_clear()
    check = inputs._sandbox()
    assert check.status == ("ok" if hidden and landlock else "warn")
    assert ("data.train" in check.detail) == (check.status == "warn")
    isolation.cache_clear()


@pytest.mark.usefixtures("only_hidden")
@pytest.mark.parametrize("path", ["{data}", "/etc/passwd", "/proc/{worker}/environ", "/proc/{worker}/root{data}"])
async def test_the_dataset_and_other_files_cannot_be_read(tmp_path, path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"tests": [{"stdin": "1", "stdout": "2"}]}')
    path = path.format(data=data, worker=os.getpid())
    outcome = await run_python(f"print(open({path!r}).read())")
    assert "PermissionError" in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.usefixtures("only_hidden")
async def test_other_files_can_be_neither_listed_nor_written_nor_executed(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho run")
    program.chmod(0o755)
    for attempt in (
        f"os.listdir({str(tmp_path)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.truncate({str(program)!r}, 0)",
        f"os.execv({str(program)!r}, ['program'])",
    ):
        outcome = await run_python(f"import os\n{attempt}")
        assert "PermissionError" in outcome.stderr or "Read-only file system" in outcome.stderr, attempt
    assert program.read_text().endswith("echo run")


async def test_the_standard_library_and_the_own_folder_can_be_used():
    code = (
        "import ctypes, decimal, json, os, random, sqlite3, ssl, statistics, tempfile, unicodedata, zoneinfo\n"
        "os.makedirs('a/b'); open('a/f', 'w').write('kept'); os.rename('a/f', 'a/b/g')\n"
        "with tempfile.TemporaryFile('w+') as file: file.write('x')\n"
        "open('/dev/null', 'w').write('x'); os.urandom(1)\n"
        "print(open('a/b/g').read(), os.cpu_count() > 0, os.listdir('a'))"
    )
    outcome = await run_python(code)
    assert (outcome.stdout, outcome.stderr) == ("kept True ['b']\n", "")


async def test_a_program_may_start_others_of_the_system():
    code = "import subprocess, sys\nprint(subprocess.check_output([sys.executable, '-c', 'print(6 * 7)'], text=True))"
    outcome = await run_python(code, limits=Limits(wall_s=60, processes=9))
    assert (outcome.stdout, outcome.stderr) == ("42\n\n", "")


async def test_share_of_tests_passed():
    code = "n = int(input())\nprint(n, ' ')\nprint(n * n)\nif n == 3: raise SystemExit(1)"
    right = [("2", "2\n4"), ("2\n", "2\n4\n"), ("5", "5\t\n25  \n\n")]
    wrong = [("2", "2\n5"), ("3", "3\n9"), ("x", ""), ("2", "\n2\n4"), ("2", "2 4"), ("2", " 2\n4"), ("2", "2\n4\n4")]
    assert await passes_tests(code, right) == 1.0
    assert await passes_tests(code, wrong) == 0.0
    assert await passes_tests(code, right + wrong) == 0.3


async def test_output_cut_short_is_not_right():
    assert await passes_tests("print('aaaab', end='')", [("", "aaaa"), ("", "aaaab")], Limits(output_bytes=4)) == 0.0


async def test_no_tests_to_pass():
    with pytest.raises(ValueError, match="no tests"):
        await passes_tests("", [])


RIGHT, WRONG = "print(int(input()) + 1)", "print(int(input()))"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (f"So:\n```python\n{RIGHT}\n```\nDone.", 1.0),
        (f"```python\n{WRONG}\n```\nNo:\n  ```python title='a'\n{RIGHT}\n  ```\n```\n{WRONG}\n```\n", 1.0),
        (f"```python\n{RIGHT}\n```\nOr\n```python\n{WRONG}\n```", 0.0),
        ("print(2)", 0.5),
        (RIGHT, 1.0),
        (f"```python\n{RIGHT}", 0.0),
        ("```python\n```", 0.0),
        ("I do not know.", 0.0),
    ],
)
async def test_unit_tests_as_the_reward_function(response, reward):
    runner = RewardRunner(RewardSection(function="async_rl.rollout.rewards.code:unit_tests"))
    row = prompt(tests=[{"stdin": "1\n", "stdout": "2\n"}, {"stdin": "4", "stdout": "5"}])
    assert (await runner.score(row, FinishedResponse(response))).reward == reward


async def test_responses_that_loop_for_ever_get_a_reward_however_long_they_wait(monkeypatch):
    """Each test has its own time, which begins when it has a place: reward.timeout_s does not hold."""
    monkeypatch.setattr(passes_tests, "__defaults__", (SHORT,))
    function = "async_rl.rollout.rewards.code:unit_tests"
    runner = RewardRunner(RewardSection(function=function, timeout_s=0.001, workers=1))
    row = prompt(tests=[{"stdin": "", "stdout": "1"}] * 2)
    assert (
        await asyncio.gather(*(runner.score(row, FinishedResponse("while True: pass")) for _ in range(3)))
        == [Score(0.0)] * 3
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "2"}, "row 17 has none"),
        ({"tests": []}, r"row 17 has \[\]"),
        ({"tests": "print"}, "row 17 has 'print'"),
        ({"tests": [{"stdin": "1"}]}, "row 17 has .*stdin"),
        ({"tests": [{"stdin": "1", "stdout": 2}]}, "row 17 has .*2"),
    ],
)
async def test_a_row_without_tests_is_named(fields, message):
    with pytest.raises(ValueError, match=f"needs a field 'tests' .*{message}"):
        await unit_tests(prompt(**fields), RIGHT)
