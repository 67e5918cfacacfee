"""Starts SGLang's server: ``python -m async_rl.rollout.engine.sglang.launcher ARGUMENTS``, as ``server`` does.

SGLang starts processes of its own, which import this module again: so what is prepared here holds in each of them.

The Python may be that of another virtual environment than the run's (rollout.sglang.python). What is imported here, and
by ``weights.sglang``, is of the standard library, of this package, or a package that SGLang itself requires.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from async_rl.rollout.engine.sglang import stand_ins
from async_rl.runtime.process import mark_semaphores, marked_file, signal_on_parent_death

# An orphan would keep a port and gigabytes of memory. The kernel kills this process when its parent ends, its children
# when it does.
signal_on_parent_death(signal.SIGKILL)
if os.getppid() == 1:
    sys.exit("sglang: the process that started the server is gone")

if not torch.cuda.is_available():
    stand_ins.install()
    stand_ins.allocate_host_memory()

# Shared memory in which processes of one server tell each other their load, and what tensor-parallel ranks send each
# other; a server that is killed would leave it there.
if (path := marked_file(os.environ.get("ASYNC_RL_SGLANG_ROLE", ""), "loads")) is not None:
    from sglang.srt.managers import load_snapshot
    from sglang.srt.utils import stale_shm_cleanup

    load_snapshot.shm_path_for = lambda _: str(path)
    stale_shm_cleanup._SGL_SHM_PREFIX = path.name

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    mark_semaphores(os.environ["ASYNC_RL_SGLANG_ROLE"])
    arguments = prepare_server_args(sys.argv[1:])
    # By the environment, for arguments can be read by everyone on the host.
    arguments.api_key = os.environ.pop("ASYNC_RL_SGLANG_KEY")
    run_server(arguments)
