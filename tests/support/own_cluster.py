"""A small Ray cluster of a test's own on this machine, each of whose nodes stands for a host."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import ray
from ray.cluster_utils import Cluster


@contextlib.contextmanager
def own_cluster(**head: Any) -> Iterator[Cluster]:
    """Give out a cluster of a head with these arguments; end it, and this process's part in it, after the block."""
    # A folder of its own: Ray writes the address there, and other tests' ray.init would join this cluster.
    folder = tempfile.mkdtemp(prefix="ray-")
    made = Cluster(initialize_head=True, head_node_args=head | {"temp_dir": folder})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
