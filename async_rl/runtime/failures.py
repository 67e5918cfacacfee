"""Translates exceptions of Ray and of libraries into the project's error tree (``errors``)."""

from __future__ import annotations

import errno
from pathlib import Path

from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from async_rl.errors import AsyncRLError, EngineDied, ProcessLost, ResourceError

# RayActorError also stands for an actor that cannot be reached (ActorUnavailableError): what was asked of it is lost
# either way. The others tell of an actor whose host is gone before its process was there.
_GONE = (RayActorError, NodeDiedError, ActorUnschedulableError, ActorPlacementGroupRemoved)

# What reading an object raises that is gone. Where the call that made it had not ended when its host died, the error of
# that call is in its place.
_OBJECT_GONE = (ObjectLostError, RayActorError, NodeDiedError, WorkerCrashedError)

# There is no room for a file: on its disk, in the user's share of it, or below the limit on a file's size.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# PyTorch raises RuntimeErrors, also for memory that is short and for collectives whose peer is gone. A ValueError or a
# TypeError is a fault of the program, which a restart does not change.
_MACHINE_FAULTS = (RuntimeError, MemoryError, OSError, RayError)


def unwrap_ray_error(error: BaseException) -> BaseException:
    """Return the exception that an actor raised, without Ray's wrappers, of which there may be several."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def user_facing_error(error: BaseException) -> BaseException:
    """Return the user-facing error inside a Ray exception, or the Ray exception itself."""
    cause = unwrap_ray_error(error)
    return cause if isinstance(cause, AsyncRLError) else error


def brief(error: BaseException) -> str:
    """Return type and first line of what an actor raised, without Ray's wrappers and traceback."""
    cause = unwrap_ray_error(error)
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def is_process_death(error: BaseException) -> bool:
    """Return whether the *called* process, or its host, is gone or cannot be reached.

    An error that it raised about another one does not count.
    """
    return isinstance(error, _GONE) and not isinstance(error, RayTaskError)


def is_host_lost(error: BaseException | None) -> bool:
    """Return whether the *called* process is gone with its host, or cannot be reached: it did nothing to cause that."""
    if isinstance(error, ActorUnavailableError):
        return True
    return error is not None and is_process_death(error) and "its node has died" in str(error)  # Ray's words


def is_machine_fault(error: BaseException) -> bool:
    """Return whether an actor raised what the faults of a machine raise in a library, which a restart may cure."""
    cause = unwrap_ray_error(error)
    return isinstance(cause, _MACHINE_FAULTS) and not isinstance(cause, AsyncRLError)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an actor raised that a collective of PyTorch has lost another rank."""
    cause = unwrap_ray_error(error)
    # Of NCCL. Errors of gloo have no class of their own, and name the file of its source.
    if type(cause).__name__ == "DistBackendError":
        return True
    return isinstance(cause, RuntimeError) and "gloo/transport" in str(cause)


def is_object_lost(error: BaseException) -> bool:
    """Return whether an object could not be read because it is gone, for example with its host.

    Of a call of an actor: whether that is why the call has failed. If the actor itself is gone it is not.
    """
    return isinstance(unwrap_ray_error(error), _OBJECT_GONE)


def is_worker_lost(error: BaseException) -> bool:
    """Return whether the rollout worker that was called, or its engine, is gone, so that another can replace it."""
    return is_process_death(error) or isinstance(unwrap_ray_error(error), EngineDied)


def explain(error: BaseException, run_dir: Path) -> AsyncRLError:
    """Return ``error`` as an AsyncRLError whose one sentence tells the user what failed and where the logs are."""
    if isinstance(error, BaseExceptionGroup):
        return explain(error.exceptions[0], run_dir)
    cause = unwrap_ray_error(error)
    if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
        return ResourceError(
            f"{cause.filename or run_dir}: {cause.strerror}; make room there, or move the run folder to another disk "
            "and set `runs` to its place; then continue the run with --resume auto"
        )
    if isinstance(error, RayTaskError):
        if isinstance(cause, AsyncRLError):
            return cause
        last = str(error).strip().splitlines()[-1]
        return AsyncRLError(f"an actor raised {last} (logs: {run_dir / 'logs'})")
    if isinstance(error, AsyncRLError):
        return error
    if isinstance(error, RayActorError):
        return ProcessLost(f"a process of the run died: {' '.join(str(error).split())} (logs: {run_dir / 'logs'})")
    return AsyncRLError(f"{type(error).__name__}: {error}")
