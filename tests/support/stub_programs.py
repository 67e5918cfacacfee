"""Programs of a cluster (ray, srun, scontrol, async-rl) as recording scripts, for tests of the scripts in launch/."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0

# Ray, as far as the scripts know it. A worker refuses to join without a head, and fails once the head is gone.
RAY = """
case "$1 $2" in
    "start --head") echo "ray has RAY_ADDRESS=${RAY_ADDRESS:-none}" >>"$STATE/calls"; touch "$STATE/head" ;;
    health-check*) [ -e "$STATE/head" ] || { echo "no cluster" >&2; exit 1; }; exit 0 ;;
    start*) [ -e "$STATE/head" ] || exit 1 ;;
esac
touch "$STATE/host.$$"
trap 'echo "ray ended" >>"$STATE/calls"; rm -f "$STATE/host.$$"; [ "$2" != --head ] || rm -f "$STATE/head"; exit 0' TERM
while [ -e "$STATE/head" ]; do sleep 0.05; done
echo "ray ended" >>"$STATE/calls"
exit 1
"""

# The module that ray_host.sh asks for the hosts of the cluster.
RAY_MODULE = """
import os, pathlib
def is_initialized():
    return (pathlib.Path(os.environ["STATE"]) / f"joined.{os.getpid()}").exists()
def init(**options):
    if options["address"] != os.environ["EXPECTED_HEAD"]:
        raise ConnectionError(f"no host at {options['address']}")
    (pathlib.Path(os.environ["STATE"]) / f"joined.{os.getpid()}").touch()
def nodes():
    hosts = pathlib.Path(os.environ["STATE"]).glob("host.*")
    return [{"NodeManagerHostname": host.name, "Alive": True} for host in hosts]
"""

# The driver: ends with DRIVER_EXIT, or runs until SIGTERM, which it answers like async-rl.
DRIVER = """
case "$*" in
    *--dry-run*)
        printf 'name: demo\\nrollout:\\n  every: 5\\ncheckpoint:\\n  every: %s\\n  every_s: 0.0\\n' "${EVERY:-20}"
        exit "${DRY_RUN_EXIT:-0}"
        ;;
esac
echo "driver joins ${RAY_ADDRESS:-nothing} token=${RAY_AUTH_TOKEN:-none} mode=${RAY_AUTH_MODE:-none}" >>"$STATE/calls"
[ -z "${DRIVER_EXIT:-}" ] || exit "$DRIVER_EXIT"
trap 'echo "driver got SIGTERM" >>"$STATE/calls"; exit 130' TERM
while :; do sleep 0.05; done
"""

# Runs the command of a job step once for each of its hosts, as one process here.
SRUN = """
for option; do
    case $option in
        --nodelist=*) IFS=, read -r -a hosts <<<"${option#*=}" ;;
        -*) ;;
        *) break ;;
    esac
    shift
done
echo "srun token=${RAY_AUTH_TOKEN:-none} export=${SLURM_EXPORT_ENV:-unset}" >>"$STATE/calls"
pids=()
for host in "${hosts[@]}"; do
    SLURMD_NODENAME=$host SLURM_CPUS_ON_NODE=6 "$@" & pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
wait; wait
"""

SCONTROL = """
case "$1" in
    show) tr , '\\n' <<<"$3" ;;
esac
"""


class Programs:
    """A folder of recording programs, and the environment in which a script finds them first."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.cwd = ROOT
        self._bin = folder / "venv" / "bin"
        modules = folder / "modules"
        for made in (self.state, self._bin, modules):
            made.mkdir(parents=True)
        (modules / "ray.py").write_text(RAY_MODULE)
        self.env = {
            "PATH": f"{self._bin}:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(folder),
            "VENV": str(self._bin.parent),
            "STATE": str(self.state),
            "PYTHONPATH": str(modules),
        }
        self._started: list[subprocess.Popen[str]] = []
        (self._bin / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')
        (self._bin / "python").chmod(0o755)
        self.add("ray", RAY)
        self.add("async-rl", DRIVER)
        self.add("hostname", 'case "$*" in -I) echo "$ADDRESSES" ;; *) echo here ;; esac')

    def add(self, name: str, body: str) -> None:
        """Make a program that records its arguments, then runs ``body`` in bash."""
        program = self._bin / name
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$STATE/calls"\n{body}\n')
        program.chmod(0o755)

    def start(self, *command: str, **env: str) -> "subprocess.Popen[str]":
        """Start a command in a process group of its own, with its output in one pipe."""
        process = subprocess.Popen(
            command,
            env=self.env | env,
            cwd=self.cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        """Run a command to its end; return its exit code and its output."""
        process = self.start(*command, **env)
        output, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        """What was called, in order, as ``name arguments``."""
        recorded = self.state / "calls"
        return recorded.read_text().splitlines() if recorded.exists() else []

    def await_call(self, beginning: str, count: int = 1) -> None:
        """Wait until so many calls begin like this."""
        deadline = time.monotonic() + DEADLINE_S
        while sum(call.startswith(beginning) for call in self.calls) < count:
            assert time.monotonic() < deadline, (beginning, self.calls)
            time.sleep(0.02)

    def close(self) -> None:
        """Kill what is left of each command that was started."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
