"""What crosses the links of a cluster, made of ``tests.cluster.hosts``: weights to its hosts, groups to its trainer.

Weights: the two ends of a run with sync.backend object_store around plain tensors, from the trainer's host to N others,
each of which also serves the others, over links that are limited. Groups, with --payloads: a whole run of real size in
which engines and trainer compute nothing (``driver_at_scale``), made with few and with many steps; the difference is
what a step costs. Printed last, one JSON line:

    weights                     by bytes, hosts and rate, seconds until the last host has the finished file, over
                                bytes / rate
    weights_sent                bytes that left the trainer's host, over bytes
    link_bytes_most             bytes that crossed any link in one direction, over bytes
    publish_s                   of the seconds, those until the trainer's store had all; no host fetches before
    cores_busy                  cores of this machine that were busy meanwhile, with whatever else runs on it. All hosts
                                share them: where they are nearly all there are, they are measured and not the links
    payload_bytes_to_trainer    bytes that the trainer's host received for each byte of the groups it trained
    payload_bytes_from_engines  bytes that the engines' hosts sent, for each
    payload_bytes_at_driver     bytes that the driver's host sent and received, for each
    local_gbit                  what one host receives over a link without a limit

    .venv/bin/python -m tests.bench.cluster [--mb 64 256] [--hosts 1 2 4] [--mbit 1000 200] [--payloads]
    .venv/bin/python -m tests.bench.cluster --mb 64 --hosts 1 2 --rounds 2      # a few minutes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import psutil
import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.config.loading import load
from async_rl.config.schema import RunConfig
from tests.cluster.hosts import Host, Hosts
from tests.support.scripted_trainer import ScriptedTrainer

ROUNDS = 3
# Of each training step of the payloads, of eight responses each.
GROUPS = 4


class _Cluster:
    """The Ray cluster as the process sees it that was started on the first host: it makes the two ends."""

    def __init__(self) -> None:
        ray.init(os.environ["CLUSTER"], log_to_driver=False)
        self._here = ray.get_runtime_context().get_node_id()
        self._sender: Any = None
        self._receivers: list[Any] = []

    def receivers(self) -> str:
        """Start a receiver on every other host; return their addresses in order."""
        from tests.support.plain_weights import Receiver

        others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != self._here]
        self._receivers = [self._on(node["NodeID"], Receiver, max_concurrency=100) for node in others]
        return " ".join(node["NodeManagerAddress"] for node in others)

    def sender(self, nbytes: int, changed_every: int) -> str:
        """Start a sender of so many bytes, in place of an earlier one; see ``PlainWeights``."""
        from tests.support.plain_weights import Sender

        if self._sender is not None:
            ray.kill(self._sender)
        self._sender = self._on(self._here, Sender, nbytes, changed_every)
        return ""

    def connect(self, count: int) -> str:
        """Connect the sender to the first receivers."""
        ray.get(self._sender.connect.remote(self._receivers[:count]))
        return ""

    def stage(self) -> str:
        """Bring weights to the receivers that are connected; return the seconds of that, and of publishing alone."""
        return json.dumps(ray.get(self._sender.stage.remote()))

    def _on(self, node: str, actor: type, *arguments: Any, **options: Any) -> Any:
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(actor).options(num_cpus=0, scheduling_strategy=pinned, **options).remote(*arguments)


def serve() -> None:
    """Do what the caller asks for, line by line. Runs on the first host."""
    cluster = _Cluster()
    for line in sys.stdin:
        name, *arguments = line.split()
        print(getattr(cluster, name)(*map(int, arguments)), flush=True)


class _Asked:
    """The process that ``serve`` runs in, as a context manager."""

    def __init__(self, hosts: Hosts) -> None:
        command = [sys.executable, "-m", "tests.bench.cluster", "--serve"]
        entered = hosts[0].command(command, {"CLUSTER": hosts.address})
        self._process = subprocess.Popen(entered, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *words: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*words, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{words}: the driver of the weights ended with exit code {self._process.wait()}")
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # which closes its pipes and waits for it
            self._process.kill()


def measure_weights(
    folder: Path,
    sizes: Sequence[int],
    counts: Sequence[int],
    rates: Sequence[float | None],
    rounds: int,
    changed_every: int = 1,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what was measured of each size in bytes, number of hosts and rate in Mbit/s, with its name.

    ``seconds`` are those of the median round; a rate of None is without a limit. Unless ``changed_every`` is 1, weights
    are sent as deltas, in which one element of so many has changed.
    """
    with Hosts(1 + max(counts), folder, store_bytes=max(sizes) * 5 // 4 + 2**28) as hosts:
        hosts.start_ray()
        with _Asked(hosts) as ask:
            by_address = {host.address: host for host in hosts}
            receivers = [by_address[address] for address in ask("receivers").split()]
            for nbytes in sizes:
                ask("sender", nbytes, changed_every)
                for count in counts:
                    used = [hosts[0], *receivers[:count]]
                    ask("connect", count)
                    ask("stage")  # connections are made, memory is touched
                    for rate in rates:
                        found = [_round(ask, used, rate) for _ in range(rounds)]
                        where = "without a limit" if rate is None else f"at {rate:g} Mbit/s"
                        name = f"{nbytes // 2**20} MB to {count} {where}"
                        median = {key: statistics.median(each[key] for each in found) for key in found[0]}
                        yield name, median | {"nbytes": nbytes, "mbit": rate or 0.0}


def _round(ask: _Asked, used: Sequence[Host], rate: float | None) -> dict[str, float]:
    with _limited(used, rate):
        before, busy = [host.link.traffic for host in used], _busy_s()
        seconds, publish_s = json.loads(ask("stage"))
        cores = (_busy_s() - busy) / seconds
        moved = [
            (sent - sent_before, received - received_before)
            for (sent, received), (sent_before, received_before) in zip(
                (host.link.traffic for host in used), before, strict=True
            )
        ]
    most = max(max(each) for each in moved)
    return {"seconds": seconds, "publish_s": publish_s, "sent": moved[0][0], "most": most, "cores_busy": cores}


@contextlib.contextmanager
def _limited(hosts: Sequence[Host], mbit: float | None) -> Iterator[None]:
    """Limit the links of these hosts. Only while weights travel: what prepares them is not measured."""
    for host in hosts if mbit is not None else ():
        host.link.limit(mbit)
    try:
        yield
    finally:
        for host in hosts if mbit is not None else ():
            host.link.unlimit()


def _busy_s() -> float:
    """Return the seconds that all cores of this machine together have been busy."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def over_hosts(config: RunConfig, path: Path, address: str, **sections: dict[str, Any]) -> RunConfig:
    """Write the settings of a run over the cluster at ``address`` to ``path``, and return them.

    They are those of ``config``, with the given values in their sections instead.
    """
    tree = json.loads(config.model_dump_json(exclude_unset=True))
    joined = {"cluster": {"address": address}, "resources": {"pin_cores": False, "device": "cpu"}}
    for name, section in (joined | sections).items():
        tree[name] = tree.get(name, {}) | section
    path.write_text(yaml.safe_dump(tree))
    return load(path)


def train(path: str, trainer: type[ScriptedTrainer]) -> NoReturn:
    """Train as a file of settings says, with a trainer that computes nothing. Runs on the driver's host."""
    from async_rl.driver import actors
    from async_rl.driver.run import run

    actors.TrainerActor = trainer  # type: ignore[misc]
    sys.exit(run(load(Path(path))))


def measure_payloads(folder: Path, tokens: int, few: int, many: int) -> dict[str, float]:
    """Return bytes over links for each byte that was trained."""
    (fewer, _), (more, group_bytes) = (_run(folder / str(steps), tokens, steps) for steps in (few, many))
    return per_trained_byte(fewer, more, (many - few) * GROUPS * group_bytes)


def per_trained_byte(fewer: Mapping[str, float], more: Mapping[str, float], trained: float) -> dict[str, float]:
    """Return what the longer of two runs moved more than the other, for each byte of groups that it trained more."""
    return {name: (more[name] - fewer[name]) / trained for name in more}


def _run(folder: Path, tokens: int, steps: int) -> tuple[dict[str, float], float]:
    """Make a run of so many steps. Returns bytes over links, and the bytes of a group."""
    from tests.bench import driver_at_scale as real_size

    real_size.make_files(folder)
    # A core for the trainer and for each engine, none on the driver's host.
    with Hosts(4, folder / "hosts", cpus=(0, 1, 1, 1), store_bytes=2 * 2**30) as hosts:
        hosts.start_ray()
        config = real_size.settings(folder, "run", tokens, steps, groups=GROUPS)
        config = over_hosts(config, folder / "config.yaml", hosts.address, rollout={"replicas": 2})
        before = [host.link.traffic for host in hosts]
        driver = hosts[0].popen([sys.executable, "-m", "tests.bench.cluster", "--train", str(folder / "config.yaml")])
        trainer = None
        while driver.poll() is None:
            trainer = trainer or next((host for host in hosts if host.processes("ScriptedTrainer")), None)
            time.sleep(0.5)
        if driver.returncode or trainer is None:
            sys.exit(f"the run of the payloads: exit code {driver.returncode}, its output is above")
        moved = {
            host: (host.link.traffic[0] - sent, host.link.traffic[1] - received)
            for host, (sent, received) in zip(hosts, before, strict=True)
        }
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    of_queued = [row["queue_bytes"] / row["queue_groups"] for row in lines if row["queue_groups"]]
    if not of_queued:
        sys.exit("the run of the payloads: the queue was empty at the end of each step; raise --tokens")
    crossed: dict[str, float] = {
        "payload_bytes_to_trainer": moved[trainer][1],
        "payload_bytes_from_engines": sum(moved[host][0] for host in hosts if host not in (hosts[0], trainer)),
        "payload_bytes_at_driver": sum(moved[hosts[0]]),
    }
    return crossed, statistics.median(of_queued)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="*", default=[64, 256], help="sizes of the weights; 1024 takes 12 GB")
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--mbit", type=float, nargs="*", default=[1000.0, 200.0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--changed-every", type=int, default=1, help="send deltas, with one changed element of so many")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a response of the payloads")
    parser.add_argument("--payloads", action="store_true", help="also count the bytes of groups, in two whole runs")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.train is not None:
        train(options.train, ScriptedTrainer)
    with tempfile.TemporaryDirectory() as name:
        result: dict[str, Any] = {}
        if options.mb:
            sizes = [mb * 2**20 for mb in options.mb]
            rates = [*options.mbit, None]
            found = measure_weights(
                Path(name) / "weights", sizes, options.hosts, rates, options.rounds, options.changed_every
            )
            result |= weights_result(found)
        if options.payloads:
            result |= measure_payloads(Path(name) / "payloads", options.tokens, 2, 8)
    print(json.dumps(_rounded(result)))


def weights_result(found: Iterator[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    """Return what is printed of the weights, and print the seconds of each as it comes."""
    result: dict[str, Any] = {
        name: {} for name in ("weights", "weights_sent", "link_bytes_most", "publish_s", "cores_busy")
    }
    for name, each in found:
        print(f"{name}: {each['seconds']:.2f} s, {each['cores_busy']:.1f} cores busy", flush=True)
        if not each["mbit"]:
            result.setdefault("local_gbit", each["nbytes"] * 8 / 1e9 / each["seconds"])
            continue
        result["weights"][name] = each["seconds"] / (each["nbytes"] * 8 / (each["mbit"] * 1e6))
        result["weights_sent"][name] = each["sent"] / each["nbytes"]
        result["link_bytes_most"][name] = each["most"] / each["nbytes"]
        result["publish_s"][name] = each["publish_s"]
        result["cores_busy"][name] = each["cores_busy"]
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
