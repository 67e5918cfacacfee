"""Runs trainer ranks in processes of their own, one layout after another, because Megatron's state is global."""

import signal
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from async_rl.config.loading import validate
from async_rl.runtime.process import begin_run, mark_semaphores, signal_on_parent_death
from async_rl.trainer.parallel import world_size

# Far beyond what a call takes on an idle machine: with a load of ten on two cores, importing Megatron takes a minute.
TIMEOUT_S = 300
# The groups of each layout of several ranks leave gloo's threads behind in the processes, and those spin: after thirty
# layouts hundreds of them want the processor.
MOST_LAYOUTS = 4


def run_config(path, **overrides):
    """Make the settings of a small float32 run; an override is section__key=value."""
    tree = {
        "model": {"path": str(path), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 128},
        # A large epsilon keeps Adam's first steps proportional to the gradient, so that updates can be compared.
        "trainer": {"optimizer": {"lr": 1e-2, "eps": 1e-2}, "router_replay": "off"},
        "resources": {"device": "cpu"},
    }
    for key, value in overrides.items():
        section = tree
        *sections, leaf = key.split("__")
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return validate(tree)


class Ranks:
    """``with Ranks(4) as ranks: ranks.run(function, config, ...)``.

    prepare: called first in each process, before Megatron is imported there.
    """

    def __init__(self, most: int, prepare: Callable[[], None] | None = None) -> None:
        self._most = most
        self._prepare = prepare
        self._start()

    def _start(self) -> None:
        self.met = 0  # layouts of several ranks that the processes have been in
        self._processes = [
            ProcessPoolExecutor(1, get_context("spawn"), _begin, (self._prepare,)) for _ in range(self._most)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._kill()

    def _kill(self) -> None:
        # They hold nothing. The end of an interpreter with torch and Megatron in it takes seconds.
        for process in self._processes:
            children = list(process._processes.values())
            for child in children:
                child.kill()
            process.shutdown(cancel_futures=True)
            for child in children:
                for path in Path("/dev/shm").glob(f"sem.async_rl-{child.pid}-*"):
                    path.unlink(missing_ok=True)

    def renew(self) -> None:
        """Kill all processes; calls get new ones."""
        self._kill()
        self._start()

    def call(self, function, *arguments):
        """Call ``function(*arguments)`` in the first process."""
        return self._processes[0].submit(function, *arguments).result(TIMEOUT_S)

    def run(self, function, config, *arguments):
        """Call ``function(trainer, *arguments)`` on every rank of the config's layout; return the results by rank."""
        count = world_size(config.trainer.parallel)
        if count > 1 and self.met >= MOST_LAYOUTS:
            self.renew()
        self.met += count > 1
        address = self.call(_open_store) if count > 1 else None
        futures = [
            process.submit(_with_trainer, config, rank, address, function, arguments)
            for rank, process in enumerate(self._processes[:count])
        ]
        done, running = wait(futures, TIMEOUT_S, return_when=FIRST_EXCEPTION)
        failed = [future.exception() for future in done if future.exception() is not None]
        if failed or running:
            self.renew()  # the other ranks would wait minutes for the one that failed
            raise failed[0] if failed else TimeoutError(f"{len(running)} of {count} ranks did not end")
        return [future.result() for future in futures]


def _begin(prepare):
    # A worker would wait for calls forever, even after the process that makes them was killed.
    signal_on_parent_death(signal.SIGKILL)
    # Named after its process: a killed one leaves its semaphores behind, and whole runs look for those of their own.
    begin_run()
    mark_semaphores("ranks")
    if prepare is not None:
        prepare()


_STORES = []  # of rank 0, until its ranks have met


def _open_store():
    from async_rl.trainer import rendezvous

    store, address = rendezvous.open_store(rendezvous.LOOPBACK)
    _STORES.append(store)
    return address


def _with_trainer(config, rank, address, function, arguments):
    import torch

    from async_rl.trainer import rendezvous
    from async_rl.trainer.trainer import Trainer

    torch.set_num_threads(1)
    store = _STORES.pop() if _STORES else None
    if store is None and address is not None:
        store = rendezvous.join_store(address)
    trainer = Trainer(config, rank=rank, store=store)
    try:
        return function(trainer, *arguments)
    finally:
        trainer.close()
