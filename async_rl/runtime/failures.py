"""One sentence for the user about why a run failed: from Ray's wrappers and foreign exceptions to the error tree."""

from __future__ import annotations

from pathlib import Path

from ray.exceptions import RayActorError, RayTaskError

from async_rl.errors import AsyncRLError, EngineDied, ProcessLost


def unwrap_ray_error(error: BaseException) -> BaseException:
    """What was raised in the actor, without Ray's wrapping; an actor may have passed on what another one raised."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def user_facing_error(error: BaseException) -> BaseException:
    """What to raise for an actor's error: what it raised where that is meant for the user, else Ray's account of it."""
    cause = unwrap_ray_error(error)
    return cause if isinstance(cause, AsyncRLError) else error


def is_process_death(error: BaseException) -> bool:
    """Whether the *called* process is gone. An error that it raised itself, about another one that is gone, is none."""
    return isinstance(error, RayActorError) and not isinstance(error, RayTaskError)


def is_worker_lost(error: BaseException) -> bool:
    """Whether the rollout worker that was called, or its engine, is gone, so that another can take its place."""
    return is_process_death(error) or isinstance(unwrap_ray_error(error), EngineDied)


def explain(error: BaseException, run_dir: Path) -> AsyncRLError:
    """``error`` as an AsyncRLError: the original one that an actor raised, or what died and where its log is."""
    if isinstance(error, BaseExceptionGroup):
        return explain(error.exceptions[0], run_dir)
    if isinstance(error, RayTaskError):
        cause = unwrap_ray_error(error)
        if isinstance(cause, AsyncRLError):
            return cause
        last = str(error).strip().splitlines()[-1]
        return AsyncRLError(f"an actor raised {last} (logs: {run_dir / 'logs'})")
    if isinstance(error, AsyncRLError):
        return error
    if isinstance(error, RayActorError):
        return ProcessLost(f"a process of the run died: {' '.join(str(error).split())} (logs: {run_dir / 'logs'})")
    return AsyncRLError(f"{type(error).__name__}: {error}")
