"""Engine and trainer compute the same function: against each other, against transformers, after interruptions, and with
every fault that must be seen. One real engine and one process for the real trainer serve the module; float32, CPU.

`pytest -s` prints the tables that docs/evidence/routing-replay.md quotes.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio

from async_rl.errors import InvalidTrajectory, WeightSyncMismatch
from async_rl.metrics import publish
from async_rl.metrics.exporter import Metrics
from async_rl.models.config import read_model_config
from async_rl.rollout import routing_policies
from async_rl.rollout.actor import RolloutReplica
from async_rl.rollout.engine.interface import Sampling
from async_rl.rollout.partial import PartialRollout
from async_rl.types import Prompt
from async_rl.weights.sync import WeightSync
from tests.support import trainer_process
from tests.support.alert_rules import assert_firing, scraped
from tests.support.engine_checkpoint import (
    VOCAB,
    engine_config,
    make_checkpoint,
    pushing,
    running,
    until_sampled,
)
from tests.support.groups import grouped, with_trajectories
from tests.support.oracle import EXACT, apart, load_versions, make_versions, say, trainer_calls, trainer_logprobs
from tests.support.step_records import step_record

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.asyncio(loop_scope="module")]

RANDOM = Sampling(temperature=1.0, top_p=1.0)
VERSIONS = 6
RUNNING = 24


@pytest.fixture(scope="module")
def dense():
    """The layers without experts."""
    return (1,)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, dense):
    """A checkpoint for each policy version, each unlike the others."""
    # No token ends a response, so that none is over before the last push.
    first = make_checkpoint(tmp_path_factory.mktemp("version0"), eos=None, dense=dense)
    return make_versions(first, VERSIONS, lambda version: tmp_path_factory.mktemp(f"version{version}"))


@pytest.fixture(scope="module")
def weights(folders):
    return load_versions(folders)


@pytest.fixture(scope="module")
def config(folders):
    return engine_config(folders[0], max_num_seqs=RUNNING)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(config):
    async with running(config) as engine:
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


def prompt(seed, length=17):
    return np.random.default_rng(seed).integers(2, VOCAB, length).astype(np.int32)


async def respond(engine, name, token_ids, limit, policy="replace", sampling=RANDOM):
    """One response, gone on with whenever a push has interrupted it."""
    partial = PartialRollout.begin(
        name,
        token_ids,
        max_response_tokens=limit,
        eos_token_id=None,
        routing_spec=engine.routing_spec,
        routing_policy=policy,
    )
    call = 0
    while not partial.finished:
        tokens, budget, first_row = partial.next_request()
        partial = partial.absorb(await engine.generate(f"{name}/{call}", tokens, sampling, budget, first_row))
        call += 1
    return partial.to_trajectory()


def ids(trajectory):
    return np.concatenate([trajectory.prompt_ids, trajectory.response_ids])


# ---- a third opinion -----------------------------------------------------------------------------------------------


async def test_engine_trainer_and_transformers_agree_on_every_token(engine, pusher, trainer, folders, weights):
    await pusher.push(weights[0])
    trajectories = await asyncio.gather(*(respond(engine, f"o{i}", prompt(i, 17 + 20 * i), 100) for i in range(9)))
    sequences, rows = [ids(t) for t in trajectories], [t.routed_experts for t in trajectories]
    sides = {
        "trainer": await trainer_logprobs(trainer, folders[0], sequences, rows),
        "transformers": await trainer(trainer_process.oracle_logprobs, folders[0], sequences, rows),
        "engine's prefill": [score.logprobs for score in await engine.score(sequences)],
    }
    for name, side in sides.items():
        sampled = [values[len(t.prompt_ids) - 1 :] for values, t in zip(side, trajectories, strict=True)]
        print(f"\n  engine's decode against {name}: {apart(sampled, [t.logprobs for t in trajectories]):.1e}")
        assert apart(sampled, [t.logprobs for t in trajectories]) <= EXACT
        for other in sides.values():
            assert apart(side, other) <= EXACT, "over the prompt too"
    assert sum(len(t.response_ids) for t in trajectories) > 300


async def test_trainer_and_transformers_agree_on_routing_that_no_router_chose(trainer, folders):
    """So that the agreement above is of forced routing, and not of two routers that happen to choose alike."""
    rng = np.random.default_rng(5)
    sequences = [prompt(seed, 60) for seed in range(4)]
    forced = [rng.random((59, 3, 8)).argsort(-1)[..., :2].astype(np.uint8) for _ in sequences]
    ours = await trainer_logprobs(trainer, folders[0], sequences, forced)
    theirs = await trainer(trainer_process.oracle_logprobs, folders[0], sequences, forced)
    native = await trainer(trainer_process.ask, "logprobs", sequences)
    assert apart(ours, theirs) <= EXACT
    assert apart(ours, native) > 0.1


# ---- partial rollouts, per policy ----------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def interrupted(engine, pusher, weights):
    """policy -> trajectories, all sampled at once while five pushes of really different weights cut them anywhere.

    Their versions are 0 to 5, as the folders are numbered.
    """
    await pusher.push(weights[0])
    first, rng = engine.version, np.random.default_rng(0)
    limits = [1, 30, *[200] * 6]
    runs = {
        policy: [
            asyncio.create_task(respond(engine, f"{policy}{i}", prompt(10 * p + i), limit, policy))
            for i, limit in enumerate(limits)
        ]
        for p, policy in enumerate(routing_policies.MERGE_POLICIES)
    }
    for version in range(1, VERSIONS):
        await until_sampled(engine, int(rng.integers(1, 15)), calls=3)
        await pusher.push(weights[version])
    result = {}
    for policy, tasks in runs.items():
        trajectories = await asyncio.gather(*tasks)
        result[policy] = [renumbered(trajectory, first) for trajectory in trajectories]
    return result


def renumbered(trajectory, first):
    segments = tuple(replace(s, version=s.version - first) for s in trajectory.segments)
    return replace(trajectory, versions=trajectory.versions - first, segments=segments)


async def differences(trainer, folders, trajectories, rows_of):
    """(trajectory, index of segment, |behaviour - trainer at that segment's version| of its tokens)."""
    result = []
    for version, folder in enumerate(folders):
        cases = [(t, i) for t in trajectories for i, segment in enumerate(t.segments) if segment.version == version]
        if not cases:
            continue
        sequences = [ids(t)[: len(t.prompt_ids) + t.segments[i].stop] for t, i in cases]
        computed = await trainer_logprobs(trainer, folder, sequences, [rows_of(t, i) for t, i in cases])
        for (t, i), values in zip(cases, computed, strict=True):
            segment = t.segments[i]
            own = values[len(t.prompt_ids) - 1 + segment.start :]
            result.append((t, i, np.abs(own - t.logprobs[segment.start : segment.stop])))
    return result


def needed(t, i):
    """Rows that the tokens of segment i and all before them have."""
    return len(t.prompt_ids) + t.segments[i].stop - 1


def own_rows(t, i):
    """Of the call that sampled segment i: what ``exact`` keeps."""
    kept = t.segments[i].routed_experts
    return t.routed_experts[: needed(t, i)] if kept is None else kept


def kept_rows(t, i):
    """Of the trajectory's one array: what ``replace`` and ``preserve`` keep."""
    return t.routed_experts[: needed(t, i)]


def said(policy, name, cases):
    values = np.concatenate([diffs for _, _, diffs in cases])
    say(policy, name, values)
    return values


async def test_exact_every_token_agrees_at_the_version_that_sampled_it(trainer, folders, interrupted):
    trajectories = interrupted["exact"]
    assert {len(t.segments) for t in trajectories} >= {1, VERSIONS}
    values = said("exact", "all tokens", await differences(trainer, folders, trajectories, own_rows))
    assert len(values) == sum(len(t.response_ids) for t in trajectories)
    assert values.max() <= EXACT


async def test_replace_agrees_after_the_last_resume_point_and_not_before(trainer, folders, interrupted):
    trajectories = interrupted["replace"]
    cases = await differences(trainer, folders, trajectories, kept_rows)
    last = said("replace", "after the last resume point", [c for c in cases if c[1] == len(c[0].segments) - 1])
    before = said("replace", "before it", [c for c in cases if c[1] < len(c[0].segments) - 1])
    assert last.max() <= EXACT
    assert before.max() > 1000 * EXACT
    assert before.mean() > 1000 * last.mean()


async def test_preserve_agrees_before_the_first_resume_point_and_not_after(trainer, folders, interrupted):
    trajectories = interrupted["preserve"]
    cases = await differences(trainer, folders, trajectories, kept_rows)
    first = said("preserve", "before the first resume point", [c for c in cases if c[1] == 0])
    after = said("preserve", "after it", [c for c in cases if c[1] > 0])
    assert first.max() <= EXACT
    assert after.max() > 1000 * EXACT
    assert after.mean() > 1000 * first.mean()


@pytest.mark.parametrize("policy", ["replace", "preserve"])
async def test_what_differs_differs_because_its_rows_are_not_those_of_its_own_call(
    trainer, folders, interrupted, policy
):
    """From ``exact``, whose segments keep their own rows, what the other policies would have kept can be made."""

    def merged(t):
        if policy == "replace":
            return t.routed_experts
        rows, known = [], 0
        for i in range(len(t.segments)):
            rows.append(own_rows(t, i)[known:])
            known = needed(t, i)
        return np.concatenate(rows)

    def rows_of(t, i):
        return merged(t)[: needed(t, i)]

    cases = await differences(trainer, folders, interrupted["exact"], rows_of)
    unlike, alike = [], []
    for t, i, diffs in cases:
        wrong = (np.sort(rows_of(t, i)) != np.sort(own_rows(t, i))).any(axis=(1, 2))
        # A token depends on its own row and on all before it.
        seen = np.maximum.accumulate(wrong)[len(t.prompt_ids) - 1 + t.segments[i].start :]
        unlike.append((t, i, diffs[seen]))
        alike.append((t, i, diffs[~seen]))
    other = said(policy, "some row is not its own call's", unlike)
    same = said(policy, "all rows are its own call's", alike)
    assert same.max() <= EXACT
    assert len(same) > 50
    assert other.mean() > 1000 * same.mean()


# ---- faults are seen -----------------------------------------------------------------------------------------------


async def sample_groups(engine, name, sampling=RANDOM):
    """Two groups of four uninterrupted responses, as version 0."""
    groups = []
    for g in range(2):
        token_ids = prompt(100 + g)
        tasks = (respond(engine, f"{name}{g}{i}", token_ids, 80, sampling=sampling) for i in range(4))
        trajectories = [
            replace(
                t,
                versions=np.zeros_like(t.versions),
                segments=tuple(replace(s, version=0) for s in t.segments),
            )
            for t in await asyncio.gather(*tasks)
        ]
        rewards = [float(i % 3) for i in range(4)]
        groups.append(grouped(f"{name}-{g}.0", Prompt(f"{name}-{g}", 1, "p", token_ids, {}), trajectories, rewards))
    return groups


def with_routing(groups, change):
    return [with_trajectories(g, lambda t: replace(t, routed_experts=change(t.routed_experts))) for g in groups]


def layer_tensors(weights, layer, part):
    return {name: t for name, t in weights.items() if name.startswith(f"model.layers.{layer}.{part}")}


async def test_faults_that_pass_the_border_show_in_a_metric_by_a_factor_of_ten_and_raise_the_alert_that_names_them(
    config, engine, pusher, trainer, folders, weights
):
    await pusher.push(weights[0])
    sound = await sample_groups(engine, "sound")
    other_temperature = await sample_groups(engine, "cold", Sampling(temperature=0.8, top_p=1.0))
    await pusher.push({**weights[0], **layer_tensors(weights[1], 2, "mlp.experts")})
    stale_layer = await sample_groups(engine, "stale")
    await pusher.push(weights[0])
    cases = {
        "none": (sound, set()),
        "routing shifted by one row": (with_routing(sound, lambda rows: np.roll(rows, 1, axis=0)), {"RoutingMismatch"}),
        "layers rolled by one": (with_routing(sound, lambda rows: np.roll(rows, 1, axis=1)), {"RoutingMismatch"}),
        "log-probs of another temperature": (other_temperature, {"TemperatureMismatch"}),
        # Whose own alert is raised by the canary of its push: test_a_stale_layer_that_the_next_push_mends.
        "other weights in one layer of the engine": (stale_layer, set()),
    }
    found = {}
    for fault, (groups, named) in cases.items():
        report = await trainer(trainer_process.train_once, folders[0], groups)
        found[fault] = report.agreement_by_staleness[0]
        print(
            f"\n  {fault:42s} rollout_logprob_abs_diff_mean{{staleness=0}} {found[fault].abs_mean:.1e}, "
            f"max {found[fault].abs_max:.1e}, ppo_kl_k3 {report.ppo_kl_k3:.1e}, "
            f"extreme_token_fraction {report.extreme_token_fraction:.3f}, "
            f"router_disagreement_ratio {report.router_disagreement:.3f}, "
            f"temperature {report.temperature[0]:.3f} explains {report.temperature[1]:.3f}"
        )
        with Metrics("pipeline") as metrics:
            publish.publish_start(metrics)
            publish.publish_step(
                metrics,
                step_record(
                    agreement=report.agreement,
                    agreement_by_staleness=report.agreement_by_staleness,
                    router_fallback_rows=report.router_fallback_rows,
                    router_disagreement=report.router_disagreement,
                    temperature=report.temperature,
                ),
            )
            assert_firing(metrics, named | (set() if fault == "none" else {"OnPolicyMismatch"}))
    assert found["none"].abs_max <= EXACT
    for fault in cases:
        if fault != "none":
            assert found[fault].abs_mean > 10 * found["none"].abs_mean, fault
            assert found[fault].abs_max > 10 * found["none"].abs_max, fault
    # With the temperature that the settings give to both sides, every ratio is 1 again.
    settings = {"temperature": 0.8}
    known = await trainer(trainer_process.train_once, folders[0], other_temperature, **settings)
    assert known.agreement_by_staleness[0].abs_max <= EXACT


async def test_faults_that_cannot_be_a_routers_choice_are_refused_at_the_border(engine):
    begin = PartialRollout.begin(
        "g.0/0", prompt(3), max_response_tokens=40, eos_token_id=None, routing_spec=engine.routing_spec
    )
    output = await engine.generate("whole", begin.prompt_ids, RANDOM, 40)
    rows = output.routed_experts

    def spoilt(where, value):
        other = rows.copy()
        other[where] = value
        return other

    refused = {
        "concatenated": np.concatenate([rows[:20], rows]),
        "without the last row": rows[:-1],
        "without a layer": rows[:, 1:],
        "one expert id out of range": spoilt((7, 1, 0), 8),
        "cached prefix all zero": spoilt(slice(0, 10), 0),
        "another dtype": rows.astype(np.uint16),
    }
    assert begin.absorb(output).routed_experts is not None
    for fault, array in refused.items():
        with pytest.raises(InvalidTrajectory, match=r"g\.0/0: routed_experts") as caught:
            begin.absorb(replace(output, routed_experts=array))
        print(f"\n  {fault:28s} {caught.value}")


# ---- the canary, with both sides real ------------------------------------------------------------------------------


class TrainerSide:
    """The open trainer of trainer_process; its pushes bring ``pushed``, whatever the trainer has, and after the first
    one ``mended`` if there is such."""

    def __init__(self, trainer, pusher, pushed):
        self._trainer, self._pusher, self._pushed = trainer, pusher, pushed
        self.mended = None
        self.pushes = 0

    async def connect(self, workers):
        """The pusher is connected already."""

    async def stage_weights(self): ...

    async def send_weights(self, version, only):
        self.pushes += 1
        self._pusher.version = version - 1
        await self._pusher.send(self._pushed if self.pushes == 1 or self.mended is None else self.mended)

    async def logprobs(self, sequences, rows):
        return await self._trainer(trainer_process.ask, "logprobs", sequences, rows)

    async def fingerprints(self, sequences, rows):
        return await self._trainer(trainer_process.ask, "fingerprints", sequences, rows)

    async def native_routing(self, sequences):
        return await self._trainer(trainer_process.ask, "native_routing", sequences)


def weight_sync(config, folders, engine, trainer, pusher, pushed, worker_type=RolloutReplica):
    side = TrainerSide(trainer, pusher, pushed)
    worker = worker_type(config, 0, None, engine, None, None)
    sync = WeightSync(config, read_model_config(folders[0]), side)
    sync.members = {0: worker}
    return sync, side


async def test_invariant_10_a_sound_push_agrees_and_reaches_every_expert(
    config, engine, pusher, trainer, folders, weights
):
    await pusher.push(weights[1])
    await trainer(trainer_process.open_trainer, folders[1])
    sync, side = weight_sync(config, folders, engine, trainer, pusher, weights[1])
    agreement = await sync.begin()
    assert agreement.unreached_experts == 0
    record = await sync.run(engine.version + 1)
    assert record.canary <= EXACT
    assert (record.retries, side.pushes) == ({}, 1)


@pytest.mark.parametrize(
    ("part", "layer"), [("mlp.experts", 2), ("mlp", 1), ("self_attn", 3), ("input_layernorm", 0), ("mlp.gate", 0)]
)
async def test_invariant_10_a_stale_layer_is_named(config, engine, pusher, trainer, folders, weights, part, layer):
    await trainer(trainer_process.open_trainer, folders[1])
    stale = {**weights[1], **layer_tensors(weights[0], layer, part)}
    sync, side = weight_sync(config, folders, engine, trainer, pusher, stale)
    with pytest.raises(WeightSyncMismatch, match=f"the first to differ is layer {layer}") as caught:
        await sync.run(engine.version + 1)
    print(f"\n  {caught.value}")
    assert side.pushes == 2


async def test_a_stale_layer_that_the_next_push_mends_raises_the_alert_that_names_it(
    config, engine, pusher, trainer, folders, weights
):
    await trainer(trainer_process.open_trainer, folders[1])
    stale = {**weights[1], **layer_tensors(weights[0], 2, "mlp.experts")}
    sync, side = weight_sync(config, folders, engine, trainer, pusher, stale)
    side.mended = weights[1]
    record = await sync.run(engine.version + 1)
    assert (record.retries, side.pushes) == ({"canary": 1}, 2)
    assert record.canary <= EXACT
    with Metrics("pipeline") as metrics:
        publish.publish_start(metrics)
        before = scraped(metrics)
        publish.publish_sync(metrics, record)
        assert_firing(metrics, {"StaleWeights"}, before=before)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("model.norm.weight", "it is the final norm or the output layer"), ("model.embed_tokens.weight", "embeddings")],
)
async def test_invariant_10_what_is_stale_outside_of_the_layers_is_named_too(
    config, engine, pusher, trainer, folders, weights, name, verdict
):
    await trainer(trainer_process.open_trainer, folders[1])
    sync, _ = weight_sync(config, folders, engine, trainer, pusher, {**weights[1], name: weights[0][name]})
    with pytest.raises(WeightSyncMismatch, match=verdict):
        await sync.run(engine.version + 1)


async def test_experts_in_another_numbering_are_refused_at_the_start(config, engine, pusher, trainer, folders, weights):
    class Renumbered(RolloutReplica):
        async def score(self, sequences):
            scores = await super().score(sequences)
            return [replace(score, routed_experts=(score.routed_experts + 1) % 8) for score in scores]

    await pusher.push(weights[0])
    await trainer(trainer_process.open_trainer, folders[0])
    sync, _ = weight_sync(config, folders, engine, trainer, pusher, weights[0], Renumbered)
    with pytest.raises(WeightSyncMismatch, match=r"number experts \(or MoE layers\) differently.*\(100% of rows\)"):
        await sync.begin()
