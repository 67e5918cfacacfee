"""Agents over HTTP on the real engine: trainer and transformers compute what it sampled, in every branch of a rollout.

OpenAI's client asks, with tools, an edited history, two requests at one time and repetitions, and there is a push in
every turn. One real engine and one process for the real trainer serve the module; float32, CPU.

`pytest -s` prints the table that docs/evidence/agents.md quotes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import pytest_asyncio

from async_rl.config.loading import validate
from async_rl.data.tokenizer import load_tokenizer
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.responses import Responses
from async_rl.trainer.samples import samples_of
from tests.support import branching_agent, trainer_process
from tests.support.branching_agent import TURNS
from tests.support.engine_checkpoint import engine_config, pushing, running
from tests.support.oracle import EXACT, apart, load_versions, make_versions, say, trainer_calls, trainer_logprobs
from tests.support.scripted_replica import Digits, ListQueue
from tests.support.tool_model import greedy_weights, make_tool_model

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

VERSIONS = 6  # unlike weights; the policy versions of the module go through them again and again
GROUPS, ROLLOUTS = 3, 2
# The mode in_flight has no ``exact``: its generations rest on the cache of several versions, and are refused it.
SETUPS = [("resume", "exact"), ("resume", "replace"), ("resume", "preserve"), ("in_flight", "replace")]
SETUPS += [("in_flight", "preserve")]
by_setup = pytest.mark.parametrize("setup", SETUPS, ids="-".join)


def settings(folder, mode="resume", routing="replace"):
    agent = {"function": "tests.support.branching_agent:works"}
    config = engine_config(folder, n=ROLLOUTS, max_num_seqs=24, max_response_tokens=760, agent=agent)
    tree = config.model_dump(mode="json", exclude_unset=True)
    return validate({**tree, "async_training": {"partial_rollout": {"mode": mode, "routing": routing}}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    first = make_tool_model(tmp_path_factory.mktemp("version0"))
    return make_versions(first, VERSIONS, lambda version: tmp_path_factory.mktemp(f"version{version}"))


@pytest.fixture(scope="module")
def weights(folders):
    return load_versions(folders)


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(settings(folders[0]))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folders):
    async with running(settings(folders[0])) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pusher(engine, weights):
    async with pushing(engine, weights[0]) as pusher:
        yield pusher


@pytest.fixture(scope="module")
def trainer(engine):
    """``await trainer(function, ...)``: a function of trainer_process, in that process."""
    with trainer_calls() as call:
        yield call


# ---- rollouts with a push in every turn ----------------------------------------------------------------------------


@dataclass
class Made:
    """What the rollouts of one setup were."""

    mode: str
    routing: str
    groups: list
    worker: RolloutReplica
    agents: dict
    outputs: list = field(default_factory=list)
    """What the engine has answered."""
    pushes: int = 0

    @property
    def trajectories(self):
        return [t for group in self.groups for rollout in group.rollouts for t in rollout.trajectories]

    @property
    def turns(self):
        """The segments of each turn: those that follow one another without a token between them."""
        return [turn for t in self.trajectories for turn in turns_of(t)]


def turns_of(trajectory):
    turns = []
    for segment in trajectory.segments:
        if turns and turns[-1][-1].stop == segment.start:
            turns[-1].append(segment)
        else:
            turns.append([segment])
    return turns


async def rollouts(folder, engine, tokenizer, mode, routing, push=None):
    """Make the rollouts of a setup; ``push`` whenever a turn has a few tokens and was in no push."""
    branching_agent.RUNNING.clear()
    queue = ListQueue(GROUPS)
    worker = RolloutReplica(settings(folder, mode, routing), 0, queue, engine, tokenizer, Digits())
    made = Made(mode, routing, queue.groups, worker, branching_agent.RUNNING)
    generate = engine.generate

    async def generating(*call):
        output = await generate(*call)
        made.outputs.append(output)
        return output

    with mock.patch.object(engine, "generate", generating):
        run, met = asyncio.create_task(worker.run()), set()
        async with asyncio.timeout(600):
            while not run.done():
                await asyncio.sleep(0)
                under_way = turns_under_way(engine)
                if push is not None and any(tokens >= 3 for turn, tokens in under_way.items() if turn not in met):
                    met.update(under_way)
                    await worker.pause()
                    await push()
                    await worker.wake()
                    await worker.resume()
                    made.pushes += 1
        await run
    await worker._worker.close()
    made.agents = dict(branching_agent.RUNNING)
    return made


def turns_under_way(engine):
    """Return how many tokens the engine call of each turn has that is being sampled; of those that have any."""
    calls = {name.rpartition("/")[0]: engine._sampled(call) or 0 for name, call in engine._calls.items()}
    found = {}
    for agent in branching_agent.RUNNING.values():
        for branch in agent.policy._session.branches:
            if branch.open is not None and (tokens := calls.get(branch.partial.trajectory_id, 0)):
                found[branch.open] = tokens
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(folders, engine, tokenizer, pusher, weights):
    """The rollouts of each setup, under pushes of really different weights."""

    async def push():
        await pusher.send(weights[index(pusher.version + 1)])

    await pusher.push(weights[index(pusher.version + 1)])
    return {setup: await rollouts(folders[0], engine, tokenizer, *setup, push) for setup in SETUPS}


def index(version):
    """Return which weights a policy version has."""
    return version % VERSIONS


@by_setup
async def test_agents_had_tools_forks_and_repetitions_and_a_push_in_every_turn(made, setup):
    found = made[setup]
    agents, worker = found.agents.values(), found.worker._worker.agents["rollout.agent"]
    assert [len(agent.heard) for agent in agents] == [TURNS] * GROUPS * ROLLOUTS
    assert sum(worker.ways.values()) == TURNS * GROUPS * ROLLOUTS
    assert worker.ways.keys() >= {"first", "root", "extended", "edited", "parallel"}
    assert max(len(turns_of(t)) for t in found.trajectories) >= 3
    assert {turn["finish_reason"] for agent in agents for turn in agent.heard.values()} >= {"stop", "tool_calls"}
    assert worker._chat.reader.read[True] >= TURNS
    # A request that was repeated had the answer to the first.
    assert worker.gateway.joined == 2 * GROUPS * ROLLOUTS
    for agent in agents:
        assert [label for label, _ in agent.again] == ["second", "third"]
        assert all(agent.heard[label] == turn for label, turn in agent.again)
    # Others, and on a busy machine some of these too, are over before a push can come.
    long = [turn for turn in found.turns if turn[-1].stop - turn[0].start > 20]
    met = [turn for turn in found.turns if len(turn) > 1]
    print(
        f"\n  {setup}: {found.pushes} pushes, {len(found.turns)} turns, {len(met)} with several versions; "
        f"{len(long)} of more than 20 tokens, {sum(len(turn) > 1 for turn in long)} of them; {dict(worker.ways)}"
    )
    assert sum(len(turn) > 1 for turn in long) >= len(long) / 2
    assert len(met) >= len(found.turns) / 3


@by_setup
async def test_invariant_12_each_token_that_was_sampled_is_in_one_trajectory_and_was_heard_as_it_is(made, setup):
    found = made[setup]
    sampled = [(t.response_ids[t.sampled], t.logprobs[t.sampled], t.versions[t.sampled]) for t in found.trajectories]
    assert Counter(each for columns in sampled for each in zip(*map(np.ndarray.tolist, columns), strict=True)) == (
        Counter(
            each
            for output in found.outputs
            for each in zip(output.token_ids.tolist(), output.logprobs.tolist(), output.versions.tolist(), strict=True)
        )
    )
    recorded = Counter()
    for trajectory in found.trajectories:
        for turn in turns_of(trajectory):
            part = slice(turn[0].start, turn[-1].stop)
            recorded[tuple(trajectory.response_ids[part].tolist()), tuple(trajectory.logprobs[part].tolist())] += 1
    heard = (turn for agent in found.agents.values() for turn in agent.heard.values())
    assert recorded == Counter((tuple(turn["token_ids"]), tuple(turn["logprobs"])) for turn in heard)


# ---- each call against transformers and the trainer ----------------------------------------------------------------


class Case(NamedTuple):
    """One engine call of a branch, with the routed experts that its tokens are trained with."""

    ids: np.ndarray
    """int32[N]: the branch up to the call's last token."""
    rows: np.ndarray
    """[N-1, L, K]."""
    parts: list[tuple[int, int]]
    """(weights, stop): which weights computed the positions up to ``stop`` in the call."""
    first: int
    """The position of the call's first token."""
    logprobs: np.ndarray
    """float32[n]: behaviour log-probs of the call's tokens."""
    weights: np.ndarray
    """int[n]: those that sampled each token."""
    as_called: np.ndarray
    """bool[N-1]: whether the rows up to a position are those of the call's own weights there."""
    of_one: np.ndarray
    """bool[N-1]: whether one version computed all positions up to one, and all their rows."""


def cases_of(trajectory, mode, routing):
    """Return the calls of a trajectory, with the rows by which docs/concepts/routing-replay.md has them trained."""
    per_segment = routing == "exact"
    samples = samples_of(trajectory, oldest_version=0, per_segment=per_segment)
    segments, prompt = trajectory.segments, len(trajectory.prompt_ids)
    calls = [[segment] for segment in segments] if mode == "resume" else turns_of(trajectory)
    assert len(samples) == (len(calls) if per_segment else 1)
    for at, call in enumerate(calls):
        sample, (start, stop) = samples[at if per_segment else 0], (call[0].start, call[-1].stop)
        count = prompt + stop - 1
        own = computed_by(call, prompt, count)
        kept = {"exact": own, "replace": computed_by(calls[-1], prompt, count)}.get(routing)
        same = own == (computed_by(segments, prompt, count) if kept is None else kept)
        tokens = slice(count - (stop - start), count)
        assert sample.loss_mask[tokens].all()
        yield Case(
            ids=sample.token_ids[: count + 1],
            rows=sample.routed_experts[:count],
            parts=[(index(segment.version), prompt + segment.stop - 1) for segment in call],
            first=tokens.start + 1,
            logprobs=sample.logprobs[tokens],
            weights=index(sample.versions[tokens]),
            as_called=np.logical_and.accumulate(same),
            of_one=np.logical_and.accumulate(same & (own == own[0])),
        )


def computed_by(segments, prompt, count):
    """Return int[count]: which weights compute each position first, if these segments are sampled one after another.

    The last token of a segment is an input of the next.
    """
    result, start = np.full(count, -1), 0
    for segment in segments:
        stop = max(start, min(count, prompt + segment.stop - 1))
        result[start:stop], start = index(segment.version), stop
    return result


class Measured(NamedTuple):
    """How far others are from the behaviour log-prob of each token sampled in a setup, and whether they may be."""

    trainer: np.ndarray
    """float32: the trainer, under the weights that sampled the token."""
    transformers: np.ndarray
    """float32: transformers, under the weights of each position, with the cache as the engine had it."""
    regret: np.ndarray
    """float32: of the worst row before it, see ``trainer_process.oracle_calls``."""
    of_one: np.ndarray
    as_called: np.ndarray


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def measured(made, trainer, folders):
    cases = {(setup, at): case for setup in SETUPS for at, case in enumerate(all_cases(made[setup]))}
    theirs = await trainer(
        trainer_process.oracle_calls,
        [(case.ids, case.rows, [(folders[of], stop) for of, stop in case.parts]) for case in cases.values()],
    )
    ours = {key: np.full(len(case.logprobs), np.nan, np.float32) for key, case in cases.items()}
    for of, folder in enumerate(folders):
        some = {key: case for key, case in cases.items() if (case.weights == of).any()}
        ids, rows = [case.ids for case in some.values()], [case.rows for case in some.values()]
        for (key, case), values in zip(some.items(), await trainer_logprobs(trainer, folder, ids, rows), strict=True):
            ours[key] = np.where(case.weights == of, values[case.first - 1 :], ours[key])
    columns = {setup: [] for setup in SETUPS}
    for ((setup, at), case), (logprobs, regret) in zip(cases.items(), theirs, strict=True):
        tokens = slice(case.first - 1, None)
        columns[setup].append(
            (
                np.abs(ours[setup, at] - case.logprobs),
                np.abs(logprobs[tokens] - case.logprobs),
                np.maximum.accumulate(regret)[tokens],
                case.of_one[tokens],
                case.as_called[tokens],
            )
        )
    return {setup: Measured(*map(np.concatenate, zip(*found, strict=True))) for setup, found in columns.items()}


def all_cases(found):
    return (case for t in found.trajectories for case in cases_of(t, found.mode, found.routing))


@by_setup
async def test_the_trainer_agrees_on_the_tokens_of_every_branch_whose_rows_and_cache_are_of_their_version(
    made, measured, setup
):
    mode, routing = setup
    found, right = measured[setup].trainer, measured[setup].of_one
    assert len(found) == sum(int(t.sampled.sum()) for t in made[setup].trajectories)
    say(f"{mode}, {routing}", "right, against the trainer", found[right])
    assert found[right].max() <= EXACT
    if routing == "exact":
        assert right.all()
        return
    say(f"{mode}, {routing}", "else", found[~right])
    assert_otherwise(found, right)


@by_setup
async def test_transformers_with_the_cache_of_the_call_agrees_on_the_tokens_whose_rows_are_those_of_the_call(
    measured, setup
):
    """Also behind a push in mode in_flight, which no trainer can compute."""
    mode, routing = setup
    found, regret, right = measured[setup].transformers, measured[setup].regret, measured[setup].as_called
    say(f"{mode}, {routing}", "right, against transformers", found[right])
    assert found[right].max() <= EXACT
    assert regret[right].max() <= EXACT, "the routers would have chosen the same"
    if routing == "exact":
        assert right.all()
        return
    say(f"{mode}, {routing}", "else", found[~right])
    assert_otherwise(found, right)
    assert regret[~right].mean() > 1000 * EXACT
    if mode == "in_flight":
        assert right.sum() > measured[setup].of_one.sum() + 50
    else:
        assert (right == measured[setup].of_one).all()


def assert_otherwise(found, right):
    """Each token that may differ does, and there are many of both."""
    assert min(right.sum(), (~right).sum()) > 20
    assert (found[~right] > EXACT).mean() > 0.98
    assert found[~right].mean() > 1000 * found[right].mean()


# ---- what an agent hears -------------------------------------------------------------------------------------------


SAMPLING = Responses.sampling


def greedy(self, *arguments):
    """Training samples at random; only what is greedy can be compared."""
    sampling, stops = SAMPLING(self, *arguments)
    return replace(sampling, greedy=True), stops


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    return greedy_weights(tmp_path_factory.mktemp("greedy"))


async def heard(folders, engine, tokenizer, pusher, same, mode, *, pushes):
    """Return the rollouts of greedy agents, and what they heard, in words and in log-probs.

    All is under the same weights, which are there before any push.
    """
    await pusher.push(same)

    async def push():
        await pusher.send(same)

    with mock.patch.object(Responses, "sampling", greedy):
        found = await rollouts(folders[0], engine, tokenizer, mode, "replace", push if pushes else None)
    said = {(rollout, *turn): what for rollout, agent in found.agents.items() for turn, what in agent.all.items()}
    logprobs = {turn: what.pop("logprobs") for turn, what in said.items()}
    return found, said, logprobs


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def heard_alone(folders, engine, tokenizer, pusher, same):
    """What greedy agents hear if nothing is pushed."""
    found, said, logprobs = await heard(folders, engine, tokenizer, pusher, same, "resume", pushes=False)
    assert (found.pushes, len(said)) == (0, (TURNS + 2) * GROUPS * ROLLOUTS)
    assert {turn["finish_reason"] for turn in said.values()} >= {"stop", "tool_calls"}
    return said, logprobs


@pytest.mark.parametrize("mode", ["resume", "in_flight", "drain"])
async def test_an_agent_hears_the_same_with_a_push_in_every_turn(
    folders, engine, tokenizer, pusher, same, heard_alone, mode
):
    """Every message, why it ended, its tokens and their log-probs."""
    found, said, logprobs = await heard(folders, engine, tokenizer, pusher, same, mode, pushes=True)
    assert said == heard_alone[0]
    assert apart(logprobs.values(), (heard_alone[1][turn] for turn in logprobs)) <= EXACT
    met = [turn for turn in found.turns if len(turn) > 1]
    print(f"\n  {mode}: {found.pushes} pushes, {len(found.turns)} turns, {len(met)} with several versions")
    if mode == "drain":
        assert found.pushes >= 4, "each waits for the turns of all rollouts"
        assert not met
    else:
        assert len(met) >= len(found.turns) / 3
