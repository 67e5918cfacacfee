"""An object store, and hosts that fetch weights from it and from each other, all in this process. No Ray."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import weakref

from async_rl.weights.object_store import HostWeights


class Reference:
    """What a store returns: it keeps an object while something refers to it."""

    def __init__(self, array):
        self.array = array


class Store:
    """An object store in this process; ``faults`` say what becomes of the n-th fetch."""

    def __init__(self):
        self.held = self.most = 0  # bytes
        self.fetched = []
        self.faults = {}

    def put(self, array):
        reference = Reference(array.copy())
        self.held += array.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(reference, self._free, array.nbytes)
        return reference

    def _free(self, nbytes):
        self.held -= nbytes

    def get(self, reference):
        fault = self.faults.get(len(self.fetched))
        self.fetched.append(reference)
        future = concurrent.futures.Future()
        if fault == "lost":
            future.set_exception(RuntimeError("the object is lost\nand much more"))
        elif fault == "corrupt":
            array = reference.array.copy()
            array[len(array) // 2] ^= 1
            future.set_result(array)
        elif fault == "short":
            future.set_result(reference.array[:-1])
        elif fault != "late":
            future.set_result(reference.array)
        self.last = future
        return future


class Peers:
    """Hosts that fetch at the same time, each in a thread, and serve each other."""

    def __init__(self, count, stores):
        self.hosts = [HostWeights(store.get) for store in stores]
        self.served = [[] for _ in range(count)]
        self.pool = concurrent.futures.ThreadPoolExecutor(32)
        self.dead = set()

    def ask(self, number, round_, start):
        def serve():
            if number in self.dead:
                raise RuntimeError("the actor died")
            self.hosts[number].available(round_, start).result(20)
            self.served[number].append(start)
            return self.hosts[number].read(round_, start)

        return self.pool.submit(serve)

    def begin(self, publication, limits=None):
        peers = [functools.partial(self.ask, number) for number in range(len(self.hosts))]

        def one(number):
            host = self.hosts[number]
            limit = (limits or {}).get(number, 20)
            return host.fetch(publication, host=number, hosts=len(peers), timeout_s=limit, peers=peers)

        return {number: self.pool.submit(one, number) for number in range(len(peers)) if number not in self.dead}

    def fetch(self, publication):
        return {number: call.result(30) for number, call in self.begin(publication).items()}

    def close(self):
        for host in self.hosts:
            host.close()
        self.pool.shutdown()


def memory_files():
    """Memory files that this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # that of listdir itself
            continue
    return sum("memfd:async_rl_weights" in link for link in links)
