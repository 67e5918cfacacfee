"""What the replicas that stay generate while one that died is replaced and joins, on hosts of ``tests.cluster.hosts``.

A whole run over four hosts: driver and trainer on one each, an engine on each of the others. Engines sample at a fixed
pace, as many responses at once as they have places, and the trainer computes nothing; the bytes of its weights are real
and reach the engines' hosts by sync.backend object_store. One engine's process ends in the middle of the run. Printed
last, one JSON line:

    throughput_while_joining    tokens per second of the engine that stays, from the other's death until it has joined,
                                over those of as long a time before
    throughput_after            the same of as long a time afterwards, over those before: how much chance there is
    tokens_per_s                those before
    joining_s                   from the death until the replica has joined
    pauses_before               how often that engine was paused for a weight sync before the death, in as long a time
    pauses_while_joining        and until the other has joined

    .venv/bin/python -m tests.bench.joining [--mb 64] [--mbit 1000] [--steps 32]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.metrics.records import StepReport
from async_rl.observe import spans
from async_rl.observe.spans import Span
from async_rl.rollout.stats import worker_id
from async_rl.trainer.worker import Groups
from async_rl.weights.shm_file import Announcement, read
from tests.bench import cluster
from tests.bench import driver_at_scale as real_size
from tests.cluster.hosts import Hosts
from tests.support.plain_weights import PlainWeights
from tests.support.scripted_engine import Fault, Script
from tests.support.scripted_trainer import ScriptedTrainer

WEIGHT_MB = "BENCH_WEIGHT_MB"
STAYS, DIES = 0, 1
TOKENS = 2048
PLACES = 24  # three groups, of eight responses each
TOKENS_PER_TURN, TURN_S = 64, 0.05
# At that pace in all places, half a minute: as long as the other takes to join, at least.
DIES_AFTER = 18 * PLACES * TOKENS


class Engine(real_size.Engine):
    """Samples 64 tokens of each response every 50 ms, and reads the weights that it is given."""

    script = Script(
        tokens_per_turn=TOKENS_PER_TURN,
        turn_s=TURN_S,
        layout=real_size.Engine.script.layout,
        fault=Fault("exit", after_tokens=DIES_AFTER, replica=DIES),
    )

    async def update_weights(self, request: Any) -> None:
        await asyncio.to_thread(read, Announcement(**request.update_info), self._table or [])


class Trainer(ScriptedTrainer):
    """Computes nothing, and sends weights of BENCH_WEIGHT_MB MiB."""

    def start(self, checkpoint: Path | None = None, store: str | None = None) -> None:
        super().start(checkpoint, store)
        self._weights = PlainWeights(int(os.environ[WEIGHT_MB]) * 2**20)

    def connect(self, rollout_workers: Sequence[Any]) -> None:
        from async_rl.weights.vllm.sender import WeightSender
        from async_rl.weights.vllm.source import StreamedSource

        if self._sender is None:
            source = StreamedSource(self._weights)
            self._sender = WeightSender(self._config, 0, source=source, host=self._meeting_host)
        self._sender.connect(rollout_workers)

    def train_step(self, mini_batches: Sequence[Groups], version: int, oldest_version: int) -> list[StepReport]:
        self._change_weights()
        return super().train_step(mini_batches, version, oldest_version)

    def finish_step(self) -> StepReport:
        self._change_weights()
        return super().finish_step()

    def stage_weights(self) -> Any:
        assert self._sender is not None
        return self._sender.stage()

    def _change_weights(self) -> None:
        self._weights.change()
        self._outdate_staged_weights()


def settings(folder: Path, steps: int, address: str) -> RunConfig:
    """Write the settings of the run, and return them."""
    config = real_size.settings(folder, "run", TOKENS, steps, groups=8)
    return cluster.over_hosts(
        config,
        folder / "config.yaml",
        address,
        sync={"backend": "object_store"},
        # So much is admitted that places in the engines are what limits it, with one of them as with two.
        async_training={"staleness_threshold": 3.0, "max_staleness": 8},
        rollout={"engine": "tests.bench.joining:Engine", "replicas": 2, "max_num_seqs": PLACES},
    )


def tokens_per_s(calls: Iterable[Span], begin: float, end: float) -> float:
    """Return what calls sampled between two times, each at its own constant pace."""
    total = 0.0
    for call in spans.overlapping(calls, begin, end):
        total += call.fields["tokens"] * (min(end, call.end) - max(begin, call.at)) / call.seconds
    return total / (end - begin)


def result(run_dir: Path) -> dict[str, float]:
    """Read from the run folder what was measured."""
    died, joined = _time(run_dir, "process_died", process=worker_id(DIES)), _time(run_dir, "worker_restarted")
    took = joined - died
    stays = list(spans.read(run_dir, worker_id(STAYS)))
    calls = [span for span in stays if span.what == "call"]
    pauses = [span.at for span in stays if span.what == "pause"]
    before = tokens_per_s(calls, max(died - took, min(call.at for call in calls)), died)
    after = tokens_per_s(calls, joined, min(joined + took, max(call.end for call in calls)))
    return {
        "throughput_while_joining": tokens_per_s(calls, died, joined) / before,
        "throughput_after": after / before,
        "tokens_per_s": before,
        "joining_s": took,
        "pauses_before": sum(died - took < at < died for at in pauses),
        "pauses_while_joining": sum(died < at < joined for at in pauses),
    }


def _time(run_dir: Path, event: str, **fields: Any) -> float:
    """Return when the driver logged an event with these fields for the first time, in seconds since 1970."""
    for line in (run_dir / "logs" / "pipeline.jsonl").read_text().splitlines():
        found = json.loads(line)
        if found["event"] == event and fields.items() <= found.items():
            return datetime.fromisoformat(found["timestamp"]).timestamp()
    raise SystemExit(f"{run_dir}: no event {event}; with more --steps the run ends later")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        from tests.bench import joining  # by its name, not as the main module: other hosts import it

        cluster.train(options.train, joining.Trainer)
    os.environ[WEIGHT_MB] = str(options.mb)  # Ray's processes inherit it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real_size.make_files(folder)
        with Hosts(4, folder / "hosts", cpus=(0, 1, 1, 1), store_bytes=2**30) as hosts:
            hosts.start_ray()
            config = settings(folder, options.steps, hosts.address)
            for host in hosts:
                host.link.limit(options.mbit)
            hosts[0].run([sys.executable, "-m", "tests.bench.joining", "--train", str(folder / "config.yaml")])
        found = result(config.run_dir)
    print(json.dumps({key: float(f"{value:.3g}") for key, value in found.items()}))


if __name__ == "__main__":
    main()
