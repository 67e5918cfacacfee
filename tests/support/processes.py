"""Questions about processes that may end while they are asked, and about what they leave."""

import os

import psutil


def alive(process: psutil.Process) -> bool:
    """Whether it runs: neither gone nor a zombie that its parent has yet to collect."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def over(pid: int) -> bool:
    """Whether the process of that id has ended."""
    try:
        return not alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def words(process: psutil.Process) -> list[str]:
    """Its command line; empty for one that is over."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def shared_files() -> set[str]:
    """The named shared memory of runs of this process, and of engines, whose files do not say whose they are."""
    own = f"sem.async_rl-{os.getpid()}-"
    return {name for name in os.listdir("/dev/shm") if name.startswith((own, "sgl", "vllm_dist"))}
