"""Evaluation of a run's current weights on its sets of problems, spread over the replicas.

Within training it runs beside the rollouts (eval.beside_rollouts): requests of both share the engines, and what must
not change the weights meanwhile, a weight sync or a pause, waits for ``finished``. A set has one result per policy
version; the recorder knows which there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from async_rl.config.inputs import HELD_OUT, EvalSetSection
from async_rl.config.schema import RunConfig
from async_rl.driver.monitor import Monitor
from async_rl.driver.recorder import Recorder
from async_rl.driver.replicas import ReplicaSupervisor
from async_rl.errors import ReplicaFailed, RewardError
from async_rl.metrics.evaluation import EvalRules, eval_line
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.evaluation import EvalAnswer, EvalProblem, EvalResult
from async_rl.types import Prompt
from async_rl.weights.sync import WeightSync


@dataclass(frozen=True, slots=True, eq=False)
class EvalSet:
    """One set of problems, read, and how it is evaluated."""

    name: str
    problems: tuple[EvalProblem, ...]
    rules: EvalRules
    every: int
    """Policy versions between evaluations within training; 0 for none."""

    @classmethod
    def of(cls, config: RunConfig, name: str, prompts: Sequence[Prompt]) -> EvalSet:
        """Make the set ``name`` of ``config.eval_sets`` from its prompts."""
        settings, terms = config.eval_sets[name], config.eval_terms(name)
        problems = tuple(
            EvalProblem(
                terms,
                prompt,
                settings.k,
                sampling(settings),
                _source(prompt, settings.source_field),
                shown=number < config.metrics.samples_per_eval,
            )
            for number, prompt in enumerate(prompts)
        )
        rules = EvalRules(settings.k, settings.pass_sizes, settings.pass_at)
        return cls(name, problems, rules, config.eval.every if settings.every is None else settings.every)

    def results(self, answers: Sequence[EvalAnswer]) -> dict[str, object]:
        """Return the results of the set from the answers to all of its problems. Raises RewardError if all failed."""
        scored = [answer.scored for answer in answers if answer.scored is not None]
        if not scored:
            where = "data.eval" if self.name == HELD_OUT else f"eval.sets.{self.name}"
            raise RewardError(
                f"{where}: each of {len(answers)} evaluation problems failed; the workers' logs have the reason of each"
            )
        return eval_line(self.name, scored, self.rules, failed=len(answers) - len(scored))


def sampling(settings: EvalSetSection) -> Sampling:
    """Return how the responses of a set are sampled."""
    greedy = settings.temperature == 0
    return Sampling(1.0 if greedy else settings.temperature, settings.top_p, greedy=greedy, top_k=settings.top_k)


def _source(prompt: Prompt, field: str) -> str | None:
    value = prompt.fields.get(field)
    return value if isinstance(value, str) else None


class Evaluator:
    """Evaluates on ``sets``; without any it does nothing."""

    def __init__(
        self,
        config: RunConfig,
        sets: Sequence[EvalSet],
        *,
        sync: WeightSync,
        replicas: ReplicaSupervisor,
        monitor: Monitor,
        recorder: Recorder,
    ) -> None:
        self._settings = config.eval
        self._sets = sets
        self._sync = sync
        self._replicas = replicas
        self._monitor = monitor
        self._recorder = recorder
        self._running: asyncio.Task[None] | None = None
        self._under_way: tuple[int, list[EvalSet]] = (0, [])  # step whose weights are evaluated, and on which sets
        self._owed: tuple[int, list[EvalSet]] = (0, [])  # the same of an evaluation that was cancelled

    def pauses(self, version: int, step: int) -> bool:
        """Return whether this version is evaluated before rollouts resume."""
        return not self._settings.beside_rollouts and bool(self._due(version, step))

    async def while_paused(self, version: int, step: int) -> None:
        """Evaluate a version that is due, before rollouts resume, unless it is evaluated beside them."""
        if self.pauses(version, step):
            await self._waited(version, step, self._due(version, step))

    def beside_rollouts(self, version: int, step: int) -> None:
        """Begin to evaluate a version that is due, now that rollouts have resumed, unless that was done."""
        if not self._settings.beside_rollouts:
            return
        sets, (owed_step, owed) = self._due(version, step), self._owed
        if owed_step == step:
            sets += [each for each in owed if each not in sets]
        self._owed = (0, [])
        if sets:
            self._under_way = step, sets
            self._running = asyncio.ensure_future(self._evaluate(version, step, sets))

    async def restored(self, version: int, step: int) -> None:
        """Evaluate the version of a run that was restored, if it is due and the run ended before its results."""
        if self._settings.beside_rollouts:
            self.beside_rollouts(version, step)
        else:
            await self._waited(version, step, self._due(version, step))

    async def finished(self, step: int) -> None:
        """Return once no evaluation is under way. Raises what it raised."""
        if (running := self._running) is not None:
            with self._monitor.phase("evaluation", step):
                await asyncio.wait([running])
            self._running = None
            if not running.cancelled():
                running.result()

    async def evaluate(self, version: int, step: int) -> None:
        """Evaluate every set with the weights of ``version`` after training step ``step``, once per version."""
        await self._waited(version, step, self._sets)

    def cancel(self) -> None:
        """End an evaluation that is under way, without a result.

        If the run continues with the same weights under another version, as after a restart of the trainer, that
        version is evaluated in its place.
        """
        if self._running is not None and self._running.cancel():
            self._owed = self._under_way

    def _due(self, version: int, step: int) -> list[EvalSet]:
        """Return the sets that are to be evaluated at this version."""
        due = (each for each in self._sets if each.every and version % each.every == 0)
        return [each for each in due if not self._recorder.is_evaluated(each.name, version, step)]

    async def _waited(self, version: int, step: int, sets: Sequence[EvalSet]) -> None:
        await self.finished(step)
        with self._monitor.phase("evaluation", step):
            await self._evaluate(version, step, sets)

    async def _evaluate(self, version: int, step: int, sets: Sequence[EvalSet]) -> None:
        """Have each replica answer its share of the problems; the share of one that fails goes to the others."""
        sets = [each for each in sets if not self._recorder.is_evaluated(each.name, version, step)]
        left, answers = [problem for each in sets for problem in each.problems], []
        prompts = {(problem.set, problem.prompt.prompt_id): problem.prompt for problem in left}
        while left and self._sync.members:
            replicas = list(self._sync.members)
            shares = {replica: left[index :: len(replicas)] for index, replica in enumerate(replicas)}
            asked = {replica: share for replica, share in shares.items() if share}
            results = await asyncio.gather(*(self._on(*each) for each in asked.items()))
            answers += [answer for result in results if result is not None for answer in result.answers]
            lost = (share for share, result in zip(asked.values(), results, strict=True) if result is None)
            left = [problem for share in lost for problem in share]
        if left:
            return
        for each in sets:
            own = [answer for answer in answers if answer.set == each.name]
            self._recorder.evaluation(each.results(own), version, step)
            for answer in own:
                self._recorder.eval_sample(prompts[answer.set, answer.prompt_id], answer, version, step)

    async def _on(self, replica: int, problems: Sequence[EvalProblem]) -> EvalResult | None:
        """Return a replica's answers to these problems; None if it failed."""
        try:
            return await self._sync.on(replica, lambda worker: worker.evaluate(problems))
        except ReplicaFailed as error:
            self._replicas.evict(error)
            return None
