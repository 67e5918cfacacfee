"""launch/ray_host.sh, launch/ray_job.sh and launch/end_driver.sh, with a stub of Ray."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.stub_programs import ROOT, Programs

HOST = ("bash", str(ROOT / "launch" / "ray_host.sh"))
JOB = ("bash", str(ROOT / "launch" / "ray_job.sh"), "my_run.yaml", "--seed", "1")

# `ray job`: its log goes on until the state of the job is in a file.
RAY_JOB = """
case "$2" in
    logs) until [ -s "$STATE/job" ] || [ -n "${LOG_BREAKS:-}" ]; do sleep 0.05; done; echo "the log" ;;
    status)
        [ -z "${UNREACHABLE:-}" ] || { echo "ConnectionError: refused" >&2; exit 1; }
        if [ -s "$STATE/job" ]; then cat "$STATE/job"; else echo "Status for job 'j': RUNNING"; fi
        ;;
    stop) echo "Job 'j' was stopped" >"$STATE/job" ;;
esac
"""


@pytest.fixture
def programs(tmp_path):
    made = Programs(tmp_path)
    made.env |= {"RAY_AUTH_TOKEN": "secret", "POLL_S": "0.05", "JOB_ID": "j", "ADDRESSES": "10.0.0.5"}
    yield made
    made.close()


# -- a host --


@pytest.mark.parametrize(
    ("addresses", "head"),
    [
        ("10.0.0.5", "10.0.0.5:6379"),
        ("10.0.0.5 192.168.1.5 fd00::5 ", "10.0.0.5:6379"),
        ("fd00::5 10.0.0.5", "10.0.0.5:6379"),
        ("169.254.3.4 172.17.0.1 10.0.0.5", "10.0.0.5:6379"),
        ("fe80::1 fd00::5 fd00::6", "[fd00::5]:6379"),
    ],
)
def test_a_head_has_the_first_global_address_ipv4_first(programs, addresses, head):
    assert programs.run(*HOST, "address", ADDRESSES=addresses) == (0, f"{head}\n")


def test_an_address_can_be_that_of_an_interface_or_given(programs):
    programs.add("ip", "echo '3: ib0    inet 10.9.0.5/16 brd 10.9.255.255 scope global ib0'")
    assert programs.run(*HOST, "address", HOST_INTERFACE="ib0", RAY_HEAD_PORT="7000") == (0, "10.9.0.5:7000\n")
    assert "ip -o addr show dev ib0 scope global" in programs.calls
    assert programs.run(*HOST, "address", HOST_ADDRESS="fd00::9") == (0, "[fd00::9]:6379\n")


def test_an_interface_that_does_not_exist_is_named(programs):
    programs.add("ip", "exit 1")
    code, output = programs.run(*HOST, "address", HOST_INTERFACE="eth7")
    assert code == 1
    assert "HOST_INTERFACE: here has no interface eth7" in output


def test_a_host_without_an_address_says_what_to_set(programs):
    code, output = programs.run(*HOST, "address", ADDRESSES="fe80::1 127.0.0.1")
    assert code == 1
    assert "HOST_ADDRESS" in output


@pytest.mark.parametrize("command", [("head",), ("worker", "10.0.0.5:6379"), ("wait", "10.0.0.5:6379", "2")])
def test_no_host_starts_without_a_token(programs, command):
    code, output = programs.run(*HOST, *command, RAY_AUTH_TOKEN="")
    assert code == 1
    assert "RAY_AUTH_TOKEN" in output
    assert not any(call.startswith("ray") for call in programs.calls)


def test_a_token_may_be_in_a_file(programs, tmp_path):
    (tmp_path / "token").write_text("secret")
    programs.start(*HOST, "head", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    programs.await_call("ray start --head")


def test_a_head_takes_jobs_when_asked_and_more_options(programs):
    programs.start(*HOST, "head", RAY_JOBS="1", RAY_START_ARGS="--num-gpus=8 --labels=a=b", HOST_CPUS="3")
    programs.await_call("ray start --head")
    (call,) = [call for call in programs.calls if call.startswith("ray start")]
    assert "--include-dashboard=true" in call
    assert "--block" in call
    assert "--num-cpus=3 --num-gpus=8 --labels=a=b" in call


def test_a_worker_gives_its_address_only_if_it_is_asked_for_one(programs):
    (programs.state / "head").touch()
    programs.start(*HOST, "worker", "10.0.0.5:6379")
    programs.await_call("ray start")
    assert "--node-ip-address" not in programs.calls[-1], "Ray takes the one with the route to the head"
    programs.start(*HOST, "worker", "10.0.0.5:6379", HOST_ADDRESS="10.0.0.6")
    programs.await_call("ray start", 2)
    assert "--node-ip-address=10.0.0.6" in programs.calls[-1]


def test_a_worker_waits_for_its_head_and_gives_up_with_ray_s_reason(programs):
    code, output = programs.run(*HOST, "worker", "10.0.0.5:6379", JOIN_S="1")
    assert code == 1
    assert "no cluster answers at 10.0.0.5:6379 within 1 s: no cluster" in output
    assert not any(call.startswith("ray start") for call in programs.calls)


# Ray on a host that the head took for dead: its first process ends, though the head answers (unless HEAD_ENDS).
RAY_TAKEN_FOR_DEAD = """
if [ "$1" = health-check ]; then
    [ -z "${HEAD_ENDS:-}" ] || [ ! -e "$STATE/again" ] || exit 1
    exit 0
fi
[ -e "$STATE/again" ] || { touch "$STATE/again"; exit 1; }
trap 'echo "ray ended" >>"$STATE/calls"; exit 0' TERM
while :; do sleep 0.05; done
"""


def test_a_worker_that_was_taken_for_dead_joins_once_more_and_ends_at_a_signal(programs):
    programs.add("ray", RAY_TAKEN_FOR_DEAD)
    host = programs.start(*HOST, "worker", "10.0.0.5:6379", HOST_ADDRESS="10.0.0.6", REJOIN_AFTER_S="0")
    programs.await_call("ray start", 2)
    assert "--address=10.0.0.5:6379 --node-ip-address=10.0.0.6 --block" in programs.calls[-1]
    host.send_signal(signal.SIGTERM)
    output, _ = host.communicate(timeout=30)
    assert output == "ray_host: here: Ray has ended (exit code 1); joining the cluster at 10.0.0.5:6379 once more\n"
    assert host.returncode == 0, "as Ray's process"
    assert programs.calls[-1] == "ray ended"


@pytest.mark.parametrize("reason", [{}, {"REJOIN_AFTER_S": "0", "HEAD_ENDS": "1"}])
def test_a_worker_that_ray_ends_at_once_or_whose_head_is_gone_ends_with_ray_s_exit_code(programs, reason):
    programs.add("ray", RAY_TAKEN_FOR_DEAD)
    code, output = programs.run(*HOST, "worker", "10.0.0.5:6379", **reason)
    assert (code, output) == (1, "")
    assert sum(call.startswith("ray start") for call in programs.calls) == 1


def test_a_wait_names_the_hosts_that_are_there_or_why_it_cannot_see(programs):
    (programs.state / "head").touch()
    (programs.state / "host.7").touch()
    wait = (*HOST, "wait", "10.0.0.5:6379")
    there = {"EXPECTED_HEAD": "10.0.0.5:6379", "JOIN_S": "0"}
    assert programs.run(*wait, "1", **there) == (0, "")
    code, output = programs.run(*wait, "2", **there)
    assert (code, output) == (1, "ray_host: 1 of 2 hosts joined within 0 s: host.7\n")
    code, output = programs.run(*wait, "2", JOIN_S="0", EXPECTED_HEAD="elsewhere")
    assert (code, output) == (1, "ray_host: the cluster at 10.0.0.5:6379 cannot be joined: no host at 10.0.0.5:6379\n")


# -- a job --


def submitted(programs):
    (call,) = [call for call in programs.calls if call.startswith("ray job submit")]
    return call


def ended(programs, state, **env):
    programs.add("ray", RAY_JOB)
    (programs.state / "job").write_text(state)
    return programs.run(*JOB, **env)


def test_a_job_is_the_driver_in_the_checkout_of_the_cluster(programs):
    code, output = ended(programs, "Job 'j' succeeded", ASYNC_RL_DIR="/shared/async_rl", STOP_S="90")
    assert code == 0, output
    call = submitted(programs)
    driver = f"{programs.env['VENV']}/bin/async-rl train my_run.yaml --seed 1"
    assert call.endswith(f"-- env --chdir=/shared/async_rl {driver}")
    assert '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}' in call
    assert "--submission-id j" in call
    assert "the log" in output


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("Job 'j' failed\nStatus message: Job entrypoint command failed with exit code 2, last available logs", 2),
        ("Job 'j' failed\nStatus message: Unexpected error", 1),
        ("Job 'j' was stopped", 130),
    ],
)
def test_a_job_s_exit_code_is_the_driver_s(programs, state, code):
    assert ended(programs, state)[0] == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job_and_waits_for_its_end(programs, number):
    programs.add("ray", RAY_JOB)
    job = programs.start(*JOB)
    programs.await_call("ray job logs")
    job.send_signal(number)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 130, output
    assert programs.calls.count("ray job stop --no-wait j") == 1
    assert "the log" in output


def test_a_cluster_that_takes_no_job_is_one_line(programs):
    programs.add("ray", "printf 'Traceback\\nConnectionError: refused\\n'; exit 1")
    assert programs.run(*JOB) == (1, "ray_job: http://127.0.0.1:8265 took no job: ConnectionError: refused\n")


def test_a_broken_connection_to_the_log_does_not_end_the_wait(programs):
    programs.add("ray", RAY_JOB)
    job = programs.start(*JOB, LOG_BREAKS="1")
    programs.await_call("ray job status", 2)
    (programs.state / "job").write_text("Job 'j' succeeded")
    job.communicate(timeout=20)
    assert job.returncode == 0


def test_a_cluster_that_does_not_answer_is_given_up(programs):
    code, output = ended(programs, "", LOG_BREAKS="1", UNREACHABLE="1", LOST_S="1")
    assert code == 1
    assert "j may still run: ConnectionError: refused" in output


# -- the end of a host --


def test_a_host_s_end_waits_for_the_driver(tmp_path):
    driver = tmp_path / "async-rl"
    driver.write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(1)\n"
        f"    open({str(tmp_path / 'checkpoint')!r}, 'w').close()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path / 'running')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(driver), "train", "my_run.yaml"])
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "running").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Of the machine's processes the script sees this one only: others may be real runs.
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        env = os.environ | {"PROC": str(tmp_path / "proc")}
        subprocess.run(["bash", str(ROOT / "launch" / "end_driver.sh")], env=env, check=True, timeout=20)
        assert (tmp_path / "checkpoint").exists()
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()
        process.wait()
