"""The canary's check: scores the probe on engines and trainer, compares the two, and says where they differ.

Owns the probe, which grows until it reaches every expert. The verdicts are ``canary``'s and ``fingerprint``'s, which
are pure; ``sync`` says when to check.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from async_rl.config.schema import RunConfig
from async_rl.models.config import ModelConfig
from async_rl.types import ExpertIds, Float32Array, Int32Array
from async_rl.weights.buckets import checksum
from async_rl.weights.canary import (
    BATCHES,
    CANDIDATES,
    CanaryReport,
    Noise,
    agrees,
    bounds,
    candidates,
    compare,
    greedy_cover,
    make_probe,
    mismatch,
    numerics,
    reached,
    text_probe,
    tolerance,
    wrong_numbering,
)
from async_rl.weights.fingerprint import (
    SCALES,
    at_fault,
    describe_layer_drift,
    describe_routing_drift,
    routing_differences,
)

if TYPE_CHECKING:
    from async_rl.rollout.engine.interface import Score

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome of the canary when every replica agreed."""

    report: CanaryReport
    """That of the replica with the largest difference."""
    unreached_experts: int
    """Experts that the probe does not reach, summed over the MoE layers."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The trainer's side of a comparison."""

    probe: Sequence[Int32Array]
    logprobs: list[Float32Array]
    """float32[N-1] of each sequence int32[N] of the probe, with the trainer's own routing."""
    replayed: dict[tuple[int, ...], list[Float32Array]] = field(default_factory=dict)
    """The same with an engine's routing replayed, by the checksums of that routing."""
    routing: dict[tuple[int | None, ...], list[ExpertIds]] = field(default_factory=dict)
    """Routing of engines that was left with them, by its checksums."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Is held while ``replayed`` or ``routing`` gets another entry."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of the canary for a replica that agreed."""

    report: CanaryReport
    routed_experts: Sequence[ExpertIds | None]
    """[N-1, L, K] of each sequence of the probe."""


class Members(Protocol):
    """Reaches the replicas; ``sync.WeightSync`` is the real one."""

    async def on(self, replica: int, call: Callable[[Any], Awaitable[T]]) -> T: ...


class ProbedTrainer(Protocol):
    """What the check needs of the trainer."""

    async def logprobs(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]: ...
    async def fingerprints(
        self, sequences: Sequence[Int32Array], routed_experts: Sequence[ExpertIds] | None
    ) -> list[Float32Array]: ...
    async def native_routing(self, sequences: Sequence[Int32Array]) -> list[Int32Array]: ...


class CanaryCheck:
    """Compares replicas with the trainer on one probe, for the length of a run.

    ``prompts``: token ids of real ones, beside the random tokens. ``noise``: what the first comparison measured; a
    restored run sets it, because its engines and its trainer have not read the same files.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ModelConfig,
        trainer: ProbedTrainer,
        members: Members,
        prompts: Iterable[Int32Array] = (),
    ) -> None:
        self._config = config
        self._model = model
        self._trainer = trainer
        self._members = members
        self._max_tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        self._probe = make_probe(config.seed, model.vocab_size, max_tokens=self._max_tokens)
        self._probe += text_probe(prompts, max_tokens=self._max_tokens)
        self._fixed = len(self._probe)  # the others were added to reach more experts
        self.noise: Noise | None = None
        self._batches = 0  # of candidates tried
        self._unreached_logged = 0  # the largest number that was logged
        self._given_up: npt.NDArray[np.bool_] | None = None  # bool[L, E]: experts that no candidate reached

    async def expect(self) -> Expected:
        """Have the trainer compute its side under the weights that it has: before engines are paused to get them."""
        probe = self._probe
        return Expected(probe, await self._trainer.logprobs(probe, None))

    @property
    def replays(self) -> bool:
        """Whether every comparison has the trainer replay the engine's routing, under the weights that were sent."""
        routed = self._model.routing_spec is not None and self._config.rollout.return_routed_experts
        return routed and numerics(self._config) != "float32"

    async def check(self, replicas: list[int], *, replay: bool) -> Agreement:
        """Compare these replicas with the trainer on the probe. Raises WeightSyncMismatch."""
        expected = await self.expect()
        verdicts = await asyncio.gather(*(self.compare(replica, expected, replay=replay) for replica in replicas))
        return await self.conclude(dict(zip(replicas, verdicts, strict=True)))

    async def compare(self, replica: int, expected: Expected, *, replay: bool = False, paused: bool = False) -> Verdict:
        """Compare one replica, which is woken if it is ``paused``, with the trainer's side of the probe.

        Raises WeightSyncMismatch.

        ``expected`` is with the trainer's own routing. If the difference is over the tolerance, or ``replay`` asks for
        it, the trainer computes again with the engine's routing replayed, as in training: a tie between two experts
        that the two sides break differently is no alarm. In bfloat16 there are always some.
        """
        probe = self._probe
        scoring = self._members.on(
            replica, lambda worker: worker.wake_and_score(probe) if paused else worker.score(probe)
        )
        scores, ours = await asyncio.gather(scoring, self._still(expected))
        scores = await self._with_routing(replica, scores, ours)
        report = await self._report(replica, scores, ours, replay=replay or self.replays)
        return Verdict(report, [score.routed_experts for score in scores])

    async def conclude(self, verdicts: Mapping[int, Verdict]) -> Agreement:
        """Return the outcome for replicas that all agreed. The first comparison of a run is also its scale."""
        if tolerance(self._config, self.noise) is None:
            self._calibrate([verdict.report for verdict in verdicts.values()])
        replica, first = next(iter(verdicts.items()))
        return Agreement(
            report=max((verdict.report for verdict in verdicts.values()), key=lambda report: report.max_abs_diff),
            unreached_experts=await self._count_unreached(replica, first.routed_experts),
        )

    async def _still(self, expected: Expected) -> Expected:
        """Return ``expected`` if it is of the present probe; else have the trainer compute it again."""
        return expected if expected.probe is self._probe else await self.expect()

    async def _with_routing(self, replica: int, scores: list[Score], ours: Expected) -> list[Score]:
        """Return the scores with the routed experts that the replica has kept, fetched once of replicas that agree."""
        key = tuple(score.left_behind for score in scores)
        if None in key:
            return scores
        if key not in ours.routing:
            async with ours.turn:
                if key not in ours.routing:
                    ours.routing[key] = await self._members.on(replica, lambda worker: worker.probed_routing())
        both = zip(scores, ours.routing[key], strict=True)
        return [replace(score, routed_experts=rows) for score, rows in both]

    async def _replayed(self, ours: Expected, routed_experts: list[ExpertIds]) -> list[Float32Array]:
        """Return the trainer's side with an engine's routing replayed, computed once for engines that route alike.

        Engines of one kind do, and a pass of the trainer for each of some hundred replicas takes longer than the rest
        of a weight sync.
        """
        key = tuple(checksum(np.ascontiguousarray(rows)) for rows in routed_experts)
        if key not in ours.replayed:
            async with ours.turn:
                if key not in ours.replayed:
                    ours.replayed[key] = await self._trainer.logprobs(ours.probe, routed_experts)
        return ours.replayed[key]

    async def _report(self, replica: int, scores: list[Score], ours: Expected, *, replay: bool) -> CanaryReport:
        """Return how far one replica is from the trainer. Raises WeightSyncMismatch if it is too far."""
        usual, most = bounds(self._config, self.noise)
        logprobs = [score.logprobs for score in scores]
        routed_experts = _routed_experts(scores) or None
        report = compare(logprobs, ours.logprobs)
        alike = agrees(report, usual)
        if routed_experts is not None and (replay or not alike):
            replayed = compare(logprobs, await self._replayed(ours, routed_experts))
            if alike and not agrees(replayed, most):
                raise wrong_numbering(replica, replayed, await self._routing_verdict(routed_experts, first=False))
            report = replayed
        if agrees(report, usual):
            return report
        blamed, where = await self._look_into_layers(replica, report, routed_experts)
        if blamed or not agrees(report, most):
            raise mismatch(replica, report, usual if agrees(report, most) else most, where)
        if self.noise is not None:
            log.warning(
                "canary_token_beyond_tolerance",
                replica=replica,
                max_abs_diff=float(f"{report.max_abs_diff:.3g}"),
                allowed=float(f"{usual.token:.3g}"),
                mean_abs_diff=float(f"{report.mean_abs_diff:.3g}"),
                reason=where,
            )
        return report

    def _calibrate(self, reports: Sequence[CanaryReport]) -> None:
        """Take what was measured as the noise of this model, from which the tolerance follows."""
        self.noise = Noise(
            dtype=numerics(self._config),
            token=max(report.max_abs_diff for report in reports),
            mean=max(report.mean_abs_diff for report in reports),
        )
        limit = tolerance(self._config, self.noise)
        assert limit is not None
        log.info(
            "canary_calibrated",
            noise=float(f"{self.noise.token:.3g}"),
            noise_mean=float(f"{self.noise.mean:.3g}"),
            allowed=float(f"{limit.token:.3g}"),
            allowed_mean=float(f"{limit.mean:.3g}"),
        )

    async def _look_into_layers(
        self, replica: int, report: CanaryReport, routed_experts: list[ExpertIds] | None
    ) -> tuple[bool, str]:
        """Look where the two sides part, layer by layer, on the worst sequence of the probe.

        Returns whether a layer is at fault itself, and what there is to say. The engine's routing is replayed, so that
        only weights can make a difference. False for an engine that provides no fingerprints.
        """
        index = report.sequence
        sequence = [self._probe[index]]
        rows = None if routed_experts is None else [routed_experts[index]]
        (engine,) = await self._members.on(replica, lambda worker: worker.fingerprints(sequence))
        if engine is not None:
            (trainer,) = await self._trainer.fingerprints(sequence, rows)
            scale = SCALES[numerics(self._config)]
            return at_fault(engine, trainer, scale), describe_layer_drift(engine, trainer, scale)
        if routed_experts is not None:
            return False, await self._routing_verdict(routed_experts, first=True)
        return False, "the engine provides no fingerprints of its layers"

    async def _routing_verdict(self, routed_experts: list[ExpertIds], *, first: bool) -> str:
        """Describe where the engine's experts differ from those that the trainer's own routers choose."""
        native = await self._trainer.native_routing(self._probe)
        return describe_routing_drift(routing_differences(routed_experts, native, self._model.moe_layers), first=first)

    # -- the probe ----------------------------------------------------------------------------------------------

    async def _count_unreached(self, replica: int, routed: Sequence[ExpertIds | None]) -> int:
        """Count the experts that the probe no longer reaches, summed over the MoE layers.

        Training moves routers. When the probe has lost experts, one batch of candidates is tried, for the next sync.
        """
        spec, known = self._model.routing_spec, self._given_up
        if spec is None or known is None or any(rows is None for rows in routed):
            return 0
        unreached = ~reached([rows for rows in routed if rows is not None], spec)
        if (unreached & ~known).any():
            await self.reach_experts(replica, 1)
        return int(unreached.sum())

    async def reach_experts(self, replica: int, batches: int) -> None:
        """Add sequences to the probe until it reaches every expert of every layer, or ``batches`` were tried.

        Which experts a sequence reaches is decided by the engine of ``replica``.
        """
        spec = self._model.routing_spec
        if spec is None or not self._config.rollout.return_routed_experts:
            return
        known = reached(await self._routed(replica, self._probe), spec)
        for _ in range(batches):
            if known.all():
                break
            tried = candidates(self._config.seed, self._batches, self._model.vocab_size, max_tokens=self._max_tokens)
            self._batches += 1
            routed = await self._routed(replica, tried)
            chosen = greedy_cover(known, routed, spec)
            added = self._probe[self._fixed :] + [tried[index] for index in chosen]
            # Routers move as long as a run lasts, and the probe must stay bounded: the oldest additions are dropped.
            self._probe = self._probe[: self._fixed] + added[max(0, len(added) - BATCHES * CANDIDATES) :]
            known |= reached([routed[index] for index in chosen], spec)
        self._given_up = ~known
        if (unreached := int((~known).sum())) > self._unreached_logged:
            self._unreached_logged = unreached
            missing = [f"{self._model.moe_layers[layer]}:{expert}" for layer, expert in np.argwhere(~known)[:5]]
            log.warning(
                "canary_experts_unreached",  # it cannot tell whether their weights are right
                unreached_experts=unreached,
                first_layer_and_expert=", ".join(missing),
            )

    async def _routed(self, replica: int, sequences: list[Int32Array]) -> list[ExpertIds]:
        return _routed_experts(await self._score(replica, sequences))

    async def _score(self, replica: int, sequences: list[Int32Array]) -> list[Score]:
        return await self._members.on(replica, lambda worker: worker.score(sequences))


def _routed_experts(scores: Sequence[Score]) -> list[ExpertIds]:
    """Return the routed experts [N-1, L, K] of each sequence; empty if the engine does not return them."""
    return [score.routed_experts for score in scores if score.routed_experts is not None]
