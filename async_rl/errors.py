"""Every exception of the package, one tree. Knows no other module.

    AsyncRLError
    ├── ConfigError            the user's settings: key, value, or a combination that cannot work
    │   ├── ModelError         checkpoint folder missing, incomplete, or unlike what the config says
    │   └── DatasetError       dataset missing, or a bad row with data.on_bad_row=fail
    │       └── RowFault       one row that cannot be used; never leaves ``data``
    ├── RunFolderError         a run folder that is missing, damaged or of another format
    ├── ResourceError          this machine lacks what the run needs (cores, memory, a free port, a package)
    ├── InvalidTrajectory      a trajectory or group that breaks an invariant; names it
    ├── WireError              a message that is truncated, too large, corrupted or of another schema
    ├── QueueError             a call that the broker refuses
    │   ├── DuplicateGroup
    │   ├── UnknownGroup       ack, release or put of a group that is not in that state
    │   └── QueueClosed
    ├── PayloadLost            the messages of finished groups are gone with the host or the store that had them
    ├── RewardError            a reward function that cannot be loaded, raises, or returns no finite number
    ├── EnvironmentFailure     an environment that cannot be loaded, raises, or returns no text
    ├── AgentFailure           an agent that cannot be loaded, raises, or returns no reward
    ├── RequestRefused         an agent's request that cannot be answered: malformed, or beyond a limit
    ├── EngineError            the rollout engine refused a request
    │   └── EngineDied         its process is dead, or does not answer
    ├── ReplayError            routed experts that cannot be replayed as configured
    ├── TrainerError           the trainer cannot continue
    │   ├── TrainerDied        a rank's process is dead, or failed in a way that a restart may cure
    │   └── CheckpointError    a checkpoint that is damaged, missing, or of another model
    │       └── CheckpointDamaged  the content of a file is not what was written; an earlier one may be intact
    ├── WeightSyncError        a weight sync failed
    │   ├── WeightSyncMismatch the canary: engine and trainer disagree after a transfer
    │   └── ReplicaFailed      one replica cannot take part in a weight sync
    ├── ProcessLost            a process of the run died more often than allowed
    ├── TooManyFailures        more groups were given up than rollout.max_failed_ratio allows
    ├── NothingToLearn         more groups were filtered than rollout.filter.max_share allows, for too long
    └── StalledError           nothing moved for longer than allowed

Each message names the setting or id, the offending value and the fix, and is written for the user: the command line
prints it as it is, without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

RefusalCode = Literal["invalid_request", "context_length_exceeded", "rollout_budget_exceeded"]
"""Why an agent's request is refused, in words that clients know: only the first is the agent's fault."""


class AsyncRLError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigError(AsyncRLError):
    """The settings are wrong; nothing was started."""


class ModelError(ConfigError):
    """The model folder is missing, incomplete, or does not fit the settings."""


class DatasetError(ConfigError):
    """The dataset is missing, empty, or has a bad row under ``data.on_bad_row=fail``."""


class RowFault(DatasetError):
    """One row of the dataset cannot be used; the message is the reason, without the place."""


class RunFolderError(AsyncRLError):
    """The run folder to read is missing, damaged, or of another format."""


class ResourceError(AsyncRLError):
    """A resource that the run needs is missing on this machine."""


class InvalidTrajectory(AsyncRLError):
    """A trajectory or group breaks an invariant (docs/concepts/architecture.md); the message names it."""


class WireError(AsyncRLError):
    """A message cannot be decoded; no part of it was used."""


class QueueError(AsyncRLError):
    """The broker refuses the call; its state is unchanged."""


class DuplicateGroup(QueueError):
    """A group with this id was put before."""


class UnknownGroup(QueueError):
    """A group is not in the state that the call needs."""


class QueueClosed(QueueError):
    """The queue was closed before or during a wait on it."""


class PayloadLost(AsyncRLError):
    """The messages of finished groups cannot be read any more; their prompts can be issued again."""

    def __init__(self, group_ids: Sequence[str]) -> None:
        super().__init__(
            f"the messages of {len(group_ids)} finished groups are lost, because their host died or their store has "
            f"no such entry: {', '.join(group_ids[:5])}{', ...' if len(group_ids) > 5 else ''}"
        )
        self.group_ids = tuple(group_ids)

    def __reduce__(self) -> tuple[type[PayloadLost], tuple[tuple[str, ...]]]:
        return PayloadLost, (self.group_ids,)


class RewardError(AsyncRLError):
    """A reward function cannot be loaded, raised, timed out, or returned something that has no finite reward."""


class RewardNotApplicable(RewardError):
    """A reward function returned None for a response, which costs the response or its group, and never the run."""


class EnvironmentFailure(AsyncRLError):
    """A multi-turn environment cannot be loaded, raised, timed out, or returned something other than text or None."""


class AgentFailure(AsyncRLError):
    """An agent cannot be loaded, raised, or returned something that is no outcome."""


class RequestRefused(AsyncRLError):
    """An agent's request to the policy cannot be answered; nothing has changed for it."""

    def __init__(self, code: RefusalCode, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code
        self.why = why

    def __reduce__(self) -> tuple[type[RequestRefused], tuple[RefusalCode, str]]:
        return RequestRefused, (self.code, self.why)


class EngineError(AsyncRLError):
    """The rollout engine refused a request or is dead."""


class EngineDied(EngineError):
    """A process of the engine is dead or does not answer; the replica can be replaced."""


class ReplayError(AsyncRLError):
    """Routed experts cannot be replayed as configured."""


class TrainerError(AsyncRLError):
    """The trainer cannot continue."""


class TrainerDied(TrainerError):
    """A trainer rank is dead, or ran out of memory or peers; the steps since the last checkpoint are lost."""


class CheckpointError(TrainerError):
    """A checkpoint is damaged, missing, or of another model."""


class CheckpointDamaged(CheckpointError):
    """A file of a checkpoint is not as it was written, which was found when it was loaded."""

    def __init__(self, path: str, damage: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {damage}")
        self.path = path
        self.damage = damage

    def __reduce__(self) -> tuple[type[CheckpointDamaged], tuple[str, str]]:
        return CheckpointDamaged, (self.path, self.damage)


class WeightSyncError(AsyncRLError):
    """A weight sync failed; the engine must not generate until one succeeds."""


class WeightSyncMismatch(WeightSyncError):
    """Engine and trainer disagree on the canary after a transfer."""


class ReplicaFailed(WeightSyncError):
    """A replica is dead or does not answer; the weight sync continues without it."""

    def __init__(self, replica: int, why: str) -> None:
        super().__init__(f"rollout-{replica}: {why}")
        self.replica = replica

    def __reduce__(self) -> tuple[type[ReplicaFailed], tuple[int, str]]:
        return ReplicaFailed, (self.replica, str(self).partition(": ")[2])


class ProcessLost(AsyncRLError):
    """A process of the run died more often than recovery.max_restarts allows; the message names it and the cause."""


class TooManyFailures(AsyncRLError):
    """More of the last groups were given up than rollout.max_failed_ratio allows; the message has the reasons."""


class NothingToLearn(AsyncRLError):
    """More of the last groups were filtered than rollout.filter.max_share allows; the message has the reasons."""


class StalledError(AsyncRLError):
    """The run made no progress for longer than watchdog.abort_s; the message says what each process waits for."""
