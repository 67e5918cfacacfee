"""What crosses the links of a cluster, made of ``tests.cluster.hosts``: weights to its hosts, groups to its trainer.

Weights: the real ends of sync.backend object_store around plain tensors, from one host to N others over links that are
limited. Groups, with --payloads: a whole run of real size in which engines and trainer compute nothing
(``driver_at_scale``), made with few and with many steps; the difference is what a step costs. Printed last, one JSON
line:

    weights                     by bytes and hosts, seconds until the last host has the finished file, over bytes / rate
    weights_sent                by bytes and hosts, bytes that left the trainer's host, over bytes
    payload_bytes_to_trainer    bytes that the trainer's host received for each byte of the groups it trained
    payload_bytes_from_engines  bytes that the engines' hosts sent, for each
    payload_bytes_at_driver     bytes that the driver's host sent and received, for each
    local_gbit                  what one host receives over a link without a limit: far above the limit, or it is the
                                machine that is measured

    .venv/bin/python -m tests.bench.cluster [--mb 64 256] [--hosts 1 2 4] [--mbit 1000] [--payloads]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from async_rl.weights.object_store import HostWeights, Publisher
from async_rl.weights.shm_file import TensorMeta
from tests.cluster.hosts import Hosts

# A tensor of each layer of an 8B model's attention, in bfloat16.
TENSOR_BYTES = 32 * 2**20
ROUNDS = 3
LIMIT_S = 600.0
RUN_HOSTS = ("driver", "trainer", "engine", "engine")


class Sender:
    """The trainer's end."""

    def __init__(self, nbytes: int) -> None:
        count = max(1, nbytes // TENSOR_BYTES)
        size = nbytes // count
        self._tensors = [(f"layer.{i}", torch.full((size,), i % 251, dtype=torch.uint8)) for i in range(count)]
        metas = [TensorMeta.of(name, tensor) for name, tensor in self._tensors]
        self._publisher = Publisher(metas, ray.put)

    def publish(self) -> Any:
        return self._publisher.publish(self._tensors)


class Receiver:
    """A host's end."""

    def __init__(self) -> None:
        self._host = HostWeights(lambda reference: reference.future())

    def fetch(self, publication: Any, host: int, hosts: int) -> None:
        self._host.fetch(publication, host=host, hosts=hosts, timeout_s=LIMIT_S)


def send_weights(nbytes: int) -> None:
    """Send weights from this host to all others, a few times; print the seconds of each. Runs on the first host."""
    ray.init(os.environ["CLUSTER"], log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]

    def on(node: str, actor: type, *arguments: Any) -> Any:
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(num_cpus=0)(actor).options(scheduling_strategy=pinned).remote(*arguments)

    sender, receivers = on(here, Sender, nbytes), [on(node, Receiver) for node in others]
    took = []
    for _ in range(ROUNDS):
        input()  # the caller has looked at the links
        began = time.monotonic()
        publication = ray.get(sender.publish.remote())
        ray.get([each.fetch.remote(publication, i, len(receivers)) for i, each in enumerate(receivers)])
        took.append(time.monotonic() - began)
        print(json.dumps(took[-1]), flush=True)
        del publication


def measure_weights(folder: Path, nbytes: int, count: int, mbit: float | None) -> tuple[float, float]:
    """Return the seconds of the median round, and the bytes that the trainer's host sent in it, to ``count`` hosts."""
    with Hosts(1 + count, folder, store_bytes=nbytes * 2 + 2**28) as hosts:
        hosts.start_ray()
        command = [sys.executable, "-m", "tests.bench.cluster", "--inside", str(nbytes)]
        entered = hosts[0].command(command, {"CLUSTER": hosts.address})
        driver = subprocess.Popen(entered, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert driver.stdin is not None
        assert driver.stdout is not None
        rounds = []
        for _ in range(ROUNDS):
            for host in hosts if mbit is not None else ():
                host.link.limit(mbit)
            before = hosts[0].link.traffic[0]
            driver.stdin.write("\n")
            driver.stdin.flush()
            line = driver.stdout.readline()
            if not line:
                sys.exit(f"the driver of the weights ended with exit code {driver.wait()}")
            rounds.append((json.loads(line), hosts[0].link.traffic[0] - before))
        driver.wait(60)
    return statistics.median(seconds for seconds, _ in rounds), statistics.median(sent for _, sent in rounds)


def train(config: str) -> None:
    """Train as a file of settings says, with a trainer that computes nothing. Runs on the driver's host."""
    from async_rl.config.loading import load
    from async_rl.driver import actors
    from async_rl.driver.run import run
    from tests.support.scripted_trainer import ScriptedTrainer

    actors.TrainerActor = ScriptedTrainer  # type: ignore[misc]
    sys.exit(run(load(Path(config))))


def measure_payloads(folder: Path, tokens: int, few: int, many: int) -> dict[str, float]:
    """Return bytes over links for each byte that was trained."""
    found = [_run(folder / str(steps), tokens, steps) for steps in (few, many)]
    trained = found[1]["trained"] - found[0]["trained"]
    return {name: (found[1][name] - found[0][name]) / trained for name in found[0] if name != "trained"}


def _run(folder: Path, tokens: int, steps: int) -> dict[str, float]:
    import yaml

    from tests.bench import driver_at_scale as real_size

    folder.mkdir(parents=True)
    (folder / "model").mkdir()
    real_size.make_model(folder / "model")
    rows = (json.dumps({"prompt": "dcba>", "answer": "abcd"}) for _ in range(1000))
    (folder / "train.jsonl").write_text("\n".join(rows))
    config = real_size.settings(folder, "run", tokens, steps, groups=4)
    # A core for the trainer and for each engine, none on the driver's host.
    with Hosts(4, folder / "hosts", cpus=(0, 1, 1, 1), store_bytes=2 * 2**30) as hosts:
        hosts.start_ray()
        tree = json.loads(config.model_dump_json(exclude_unset=True))
        tree["cluster"] = {"address": hosts.address}
        tree["metrics"] = {"samples_per_step": 0}
        tree["rollout"]["replicas"] = 2
        tree["resources"] = {"pin_cores": False, "device": "cpu"}
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        before = [host.link.traffic for host in hosts]
        driver = hosts[0].popen([sys.executable, "-m", "tests.bench.cluster", "--train", str(folder / "config.yaml")])
        trainer = None
        while driver.poll() is None:
            trainer = trainer or next((host for host in hosts if host.processes("ScriptedTrainer")), None)
            time.sleep(0.5)
        if driver.returncode or trainer is None:
            sys.exit(f"the run of the payloads: exit code {driver.returncode}, see {folder}")
        moved = {
            host: (host.link.traffic[0] - sent, host.link.traffic[1] - received)
            for host, (sent, received) in zip(hosts, before, strict=True)
        }
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    per_group = statistics.median(row["queue_bytes"] / row["queue_groups"] for row in lines if row["queue_groups"])
    return {
        "trained": per_group * config.trainer.groups_per_step * len(lines),
        "payload_bytes_to_trainer": moved[trainer][1],
        "payload_bytes_from_engines": sum(moved[host][0] for host in hosts if host not in (hosts[0], trainer)),
        "payload_bytes_at_driver": sum(moved[hosts[0]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="*", default=[64, 256], help="sizes of the weights; 1024 takes 8 GB")
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a response of the payloads")
    parser.add_argument("--payloads", action="store_true", help="also count the bytes of groups, in two whole runs")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        send_weights(options.inside)
        return
    if options.train is not None:
        train(options.train)
    result: dict[str, Any] = {"weights": {}, "weights_sent": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smallest = options.mb[0] * 2**20 if options.mb else 0
        if smallest:
            seconds, _ = measure_weights(folder / "unlimited", smallest, 1, None)
            result["local_gbit"] = smallest * 8 / 1e9 / seconds
        for mb in options.mb:
            for count in options.hosts:
                nbytes = mb * 2**20
                seconds, sent = measure_weights(folder / f"{mb}-{count}", nbytes, count, options.mbit)
                result["weights"][f"{mb} MB to {count}"] = seconds / (nbytes * 8 / (options.mbit * 1e6))
                result["weights_sent"][f"{mb} MB to {count}"] = sent / nbytes
                print(f"{mb} MB to {count}: {seconds:.2f} s", flush=True)
        if options.payloads:
            result |= measure_payloads(folder / "payloads", options.tokens, 2, 8)
    print(json.dumps(_rounded(result)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
