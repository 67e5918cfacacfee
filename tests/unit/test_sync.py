"""WeightSync against scripted sides: when a sync is retried, what a mismatch says, which experts are probed."""

import asyncio

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from async_rl.config.loading import validate
from async_rl.errors import ReplicaFailed, WeightSyncError, WeightSyncMismatch
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.interface import Score
from async_rl.weights.canary import SEQUENCES
from async_rl.weights.fingerprint import WIDTH
from async_rl.weights.sync import WeightSync

VOCAB, EXPERTS, LAYERS = 50, 4, 3
MODEL = ModelConfig(
    architecture="Qwen3MoeForCausalLM", vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_layers=LAYERS,
    num_heads=1, num_kv_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
    tie_word_embeddings=False, num_experts=EXPERTS, top_k=1, moe_intermediate_size=8, moe_layers=(0, 2),
)  # fmt: skip


class Side:
    """``side.method(...)`` gives something to await, which calls ``do_method`` and is noted in ``calls``."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("do_"):
            raise AttributeError(name)
        target = getattr(self, f"do_{name}")

        async def method(*arguments, **named):
            self.calls.append(name)
            return target(*arguments, **named)

        return method


class Engine(Side):
    """Log-prob and expert of a token are functions of it; log-probs are off by ``error`` before transfer ``wrong``."""

    def __init__(self, wrong=0, error=1.0, reach=EXPERTS, renumber=0, layer=1):
        super().__init__()
        self.wrong, self.error, self.reach, self.renumber, self.layer = wrong, error, reach, renumber, layer
        self.pushes = 0

    @property
    def off(self):
        return self.error if self.pushes < self.wrong else 0.0

    def do_score(self, sequences):
        return [Score(logprobs(s) + np.float32(self.off), self.routing(s)) for s in sequences]

    def routing(self, sequence):
        experts = (sequence[:-1] % self.reach + self.renumber) % EXPERTS
        return np.repeat(experts[:, None, None], 2, axis=1).astype(np.uint8)

    def do_fingerprints(self, sequences):
        stream = fingerprints(sequences[0])
        stream[self.layer + 1 :] += self.off
        return [stream]

    dead = None  # the call at which its process is found dead
    hangs = None  # the call that it never answers
    owed = None  # what its engine has not answered

    def __getattr__(self, name):
        method = super().__getattr__(name)

        async def answered(*arguments, **named):
            if self.dead in (name, "ever"):
                self.dead = "ever"
                raise ActorDiedError()
            if self.hangs == name:
                self.owed = name
                await asyncio.sleep(3600)
            return await method(*arguments, **named)

        return answered

    def do_pause(self, *, end_calls):
        self.ended_calls = end_calls

    def do_wake(self): ...
    def do_resume(self): ...

    def do_receive(self): ...

    def do_unanswered(self):
        return self.owed


class Trainer(Side):
    def __init__(self, engine):
        super().__init__()
        self.engine = engine
        self.workers, self.pushed_to, self.fails = [], [], {}

    async def connect(self, replicas):
        self.calls.append("connect")
        self.workers = replicas
        await self.transfer("connect", None)

    async def send_weights(self, version, only):
        self.calls.append("send_weights")
        await self.transfer("send_weights", only)
        self.engine.pushes += 1

    async def transfer(self, method, only):
        """As the real one, it fails with the engines that it calls."""
        if self.fails.pop(method, False):
            raise WeightSyncError("a transfer cut in the middle")
        for engine in self.workers if only is None else [self.workers[only]]:
            await engine.receive()
        self.pushed_to.append(only)

    def do_stage_weights(self): ...

    def do_logprobs(self, sequences, routing):
        wrong = 0.0 if routing is None or not self.engine.renumber else 0.7
        return [logprobs(sequence) + np.float32(wrong) for sequence in sequences]

    def do_fingerprints(self, sequences, routing):
        return [fingerprints(sequences[0])]

    def do_native_routing(self, sequences):
        return [np.repeat((s[:-1] % EXPERTS)[:, None, None], 2, axis=1) for s in sequences]


def logprobs(sequence):
    return -(sequence[1:] % 7).astype(np.float32)


def fingerprints(sequence):
    return np.random.default_rng(0).random((LAYERS + 1, len(sequence) - 1, WIDTH)).astype(np.float32)


def sync(engine, **sections):
    tree = {"model": {"path": "m", "dtype": "float32"}, "data": {"train": "d"}, **sections}
    trainer = Trainer(engine)
    subject = WeightSync(validate(tree), MODEL, trainer)
    subject.members = {0: engine}
    return subject, trainer


async def test_invariant_10_a_sync_that_arrives_is_made_once():
    subject, _ = sync(engine := Engine())
    await subject.begin()
    engine.calls.clear()
    record = await subject.run(1)
    assert (record.canary, record.retries, record.unreached_experts) == (0.0, {}, 0)
    assert engine.calls == ["receive", "pause", "receive", "wake", "score"]
    assert set(record.phases) == {"pause", "transfer", "wake", "canary"}


async def test_a_sync_that_arrives_wrong_is_tried_once_more():
    subject, trainer = sync(engine := Engine(wrong=2))
    record = await subject.run(1)
    assert record.retries == {"canary": 1}
    assert trainer.calls.count("send_weights") == 2
    # The engine is paused for the second transfer as it was for the first.
    assert [call for call in engine.calls if call in ("pause", "wake")] == ["pause", "wake"] * 2


@pytest.mark.parametrize("layer", [0, 1, 2])
async def test_invariant_10_a_second_mismatch_ends_the_run_and_names_the_layer(layer):
    subject, trainer = sync(Engine(wrong=9, layer=layer))
    with pytest.raises(
        WeightSyncMismatch, match=f"differs most in layer {layer} .*the first to differ is layer {layer}"
    ):
        await subject.run(1)
    assert trainer.calls.count("send_weights") == 2


async def test_in_bfloat16_the_engines_routing_is_replayed_at_every_sync():
    """Near-ties always fall differently there, and a tolerance wide enough for them would hide what it is for."""
    for dtype, passes in (("float32", 1), ("bfloat16", 2)):
        subject, trainer = sync(Engine(), model={"path": "m", "dtype": dtype})
        await subject.run(1)
        assert trainer.calls.count("logprobs") == passes


async def test_in_flight_generations_cannot_be_undone_so_nothing_is_tried_again():
    mode = {"async_training": {"partial_rollout": {"mode": "in_flight"}}}
    subject, trainer = sync(Engine(wrong=2), **mode)
    with pytest.raises(WeightSyncMismatch):
        await subject.run(1)
    assert trainer.calls.count("send_weights") == 1


async def test_expert_ids_in_another_numbering_are_refused_at_the_start_under_r3_only():
    subject, _ = sync(Engine(renumber=1))
    with pytest.raises(
        WeightSyncMismatch, match=r"number experts.*differently.*differs most in layer 0 \(100% of rows\), layer 2"
    ):
        await subject.begin()
    subject, _ = sync(Engine(renumber=1), trainer={"router_replay": "R2"})
    await subject.begin()


async def test_an_engine_that_is_off_at_the_start_gets_no_weights():
    subject, trainer = sync(Engine(wrong=1))
    with pytest.raises(WeightSyncMismatch, match="layer 1"):
        await subject.begin()
    assert "send_weights" not in trainer.calls


async def test_the_probe_grows_until_it_reaches_every_expert_and_no_further():
    subject, _ = sync(engine := Engine())
    rare = VOCAB - 1
    engine.routing = lambda s: np.repeat(np.where(s[:-1] == rare, 3, s[:-1] % 3)[:, None, None], 2, axis=1).astype(
        np.uint8
    )
    subject.canary._probe = [s % rare for s in subject.canary._probe]  # whatever they hold, none holds the rare token
    agreement = await subject.begin()
    assert agreement.unreached_experts == 0
    assert SEQUENCES < len(subject.canary._probe) <= SEQUENCES + 2


async def test_experts_that_nothing_reaches_are_counted_and_not_searched_for_at_every_sync():
    subject, _ = sync(engine := Engine(reach=EXPERTS - 1))
    assert (await subject.begin()).unreached_experts == 2  # one in each of two layers
    engine.calls.clear()
    assert (await subject.run(1)).unreached_experts == 2
    assert engine.calls.count("score") == 1
    # A router that has moved: one more search, for the syncs after it.
    engine.reach = EXPERTS - 2
    engine.calls.clear()
    assert (await subject.run(2)).unreached_experts == 4
    assert engine.calls.count("score") == 3
    engine.calls.clear()
    await subject.run(3)
    assert engine.calls.count("score") == 1


def fleet(count, **sections):
    """A sync of ``count`` replicas."""
    subject, trainer = sync(Engine(), **sections)
    engines = {replica: Engine() for replica in range(count)}
    subject.members = dict(engines)
    return subject, trainer, engines


@pytest.mark.parametrize("call", ["pause", "receive", "wake", "score"])
async def test_a_replica_that_dies_during_a_sync_is_named_and_the_others_are_not_resumed(call):
    subject, _, engines = fleet(3)
    engines[1].dead = call
    with pytest.raises(ReplicaFailed, match="rollout-1") as failed:
        await subject.run(1)
    assert failed.value.replica == 1
    assert not any("resume" in engine.calls for engine in engines.values()), "half of the weights, or unverified ones"
    # The caller syncs again without it; the trainer is connected again.
    del subject.members[1]
    await subject.run(1)
    await subject.resume()
    assert [engine.calls.count("resume") for engine in engines.values()] == [1, 0, 1]


@pytest.mark.parametrize("call", ["pause", "receive", "score"])
async def test_an_engine_that_does_not_respond_is_named(call, monkeypatch):
    monkeypatch.setattr("async_rl.runtime.timeouts.ANSWER_S", 0.05)
    subject, _, engines = fleet(2, sync={"timeout_s": 0.1})
    engines[0].hangs = call
    with pytest.raises(ReplicaFailed, match=f"rollout-0: engine did not respond to `{call}`"):
        await subject.run(1)
    engines[0].hangs = "unanswered"
    with pytest.raises(ReplicaFailed, match=r"rollout-0: process did not respond within 0\.05 s"):
        await subject._raise_failed_replica()


async def test_a_sync_that_takes_too_long_without_a_failed_replica_says_what_to_do():
    subject, _, engines = fleet(1, sync={"timeout_s": 0.05})

    async def slow(*_):
        await asyncio.sleep(3600)

    subject._trainer.transfer = slow
    with pytest.raises(WeightSyncError, match=r"longer than sync\.timeout_s = 0\.05 s; finished phases: none"):
        await subject.run(1)
    assert "resume" not in engines[0].calls


async def test_a_transfer_that_is_cut_is_retried_over_a_new_connection():
    subject, trainer, _ = fleet(2)
    await subject.run(1)
    trainer.fails["send_weights"] = True
    trainer.calls.clear()
    assert (await subject.run(2)).retries == {"transfer": 1}
    assert [call for call in trainer.calls if call in ("connect", "send_weights")] == [
        "send_weights", "connect", "send_weights",
    ]  # fmt: skip
    always = {"send_weights": True}
    trainer.fails = type("Always", (), {"pop": lambda _, key, default: always.get(key, default)})()
    with pytest.raises(WeightSyncError, match="cut in the middle"):
        await subject.run(3)


async def test_a_lasting_fault_of_the_trainer_is_named_although_a_replica_died_before():
    subject, trainer, _ = fleet(3)
    await subject.run(1)
    del subject.members[2]
    always = {"connect": True}
    trainer.fails = type("Always", (), {"pop": lambda _, key, default: always.get(key, default)})()
    with pytest.raises(WeightSyncError, match="cut in the middle") as failed:
        await subject.run(2)
    assert not isinstance(failed.value, ReplicaFailed)


async def test_the_trainer_is_connected_when_the_members_change_and_only_then():
    subject, trainer, engines = fleet(2)
    for version in (1, 2):
        await subject.run(version)
    assert trainer.calls.count("connect") == 1
    subject.members[2] = Engine()
    await subject.run(3)
    assert trainer.calls.count("connect") == 2
    assert trainer.workers == [engines[0], engines[1], subject.members[2]]


async def test_rolling_syncs_pause_one_replica_at_a_time():
    subject, trainer, engines = fleet(3, sync={"rolling": True})
    order = []
    for replica, engine in engines.items():
        for name in ("pause", "resume"):
            setattr(engine, f"do_{name}", lambda *, event=(name, replica), **_: order.append(event))
    snapshots = []

    async def paused(replica):
        snapshots.append(replica)
        order.append(("snapshot", replica))

    record = await subject.run(1, paused=paused)
    assert order == [(event, replica) for replica in range(3) for event in ("pause", "snapshot", "resume")]
    assert trainer.pushed_to == [None, 0, 1, 2]  # None: the connection
    assert record.seconds == pytest.approx(sum(record.phases.values()))


async def test_what_is_done_while_replicas_are_paused_is_done_for_all_at_once():
    subject, _, _ = fleet(8)
    at_once, most = 0, []

    async def paused(replica):
        nonlocal at_once
        at_once += 1
        await asyncio.sleep(0.01)
        most.append(at_once)
        at_once -= 1

    await subject.run(1, paused=paused)
    await subject.while_paused(paused)
    assert max(most[:8]) == max(most[8:]) == 8


async def test_a_snapshot_ends_calls_that_would_be_frozen():
    subject, _, engines = fleet(1)
    for wanted in (False, True):
        await subject.run(1 + wanted, end_calls=wanted)
        assert engines[0].ended_calls is wanted


async def test_a_pause_without_a_sync_sends_nothing_and_names_the_replica_that_hangs(monkeypatch):
    monkeypatch.setattr("async_rl.runtime.timeouts.ANSWER_S", 0.05)
    subject, trainer, engines = fleet(2, sync={"timeout_s": 0.1})
    taken = []

    async def paused(replica):
        taken.append((replica, "resume" in engines[replica].calls))

    await subject.while_paused(paused)
    assert taken == [(0, False), (1, False)]
    assert trainer.calls == []
    assert all(engine.calls == ["pause", "wake", "resume"] for engine in engines.values())
    engines[1].hangs = "pause"
    with pytest.raises(ReplicaFailed, match="rollout-1: engine did not respond to `pause`"):
        await subject.while_paused(paused)


async def test_the_probe_stays_bounded_however_the_routers_move(monkeypatch):
    monkeypatch.setattr("async_rl.weights.canary_check.BATCHES", 1)
    monkeypatch.setattr("async_rl.weights.canary_check.CANDIDATES", 2)
    # Each time, some candidate reaches what nothing reached before.
    monkeypatch.setattr("async_rl.weights.canary_check.greedy_cover", lambda *_: [0])
    subject, _ = sync(Engine(reach=EXPERTS - 1))
    first, newest = [sequence.tobytes() for sequence in subject.canary._probe], []
    for _ in range(5):
        await subject.canary.reach_experts(0, 1)
        newest.append(subject.canary._probe[-1].tobytes())
    assert [sequence.tobytes() for sequence in subject.canary._probe] == [*first, *newest[-2:]]


async def test_the_trainer_scores_the_probe_while_the_engines_generate():
    subject, trainer = sync(engine := Engine())
    calls = trainer.calls = engine.calls = []
    await subject.run(1)
    assert calls.count("logprobs") == 1, "the canary needs no further call of the trainer"
    order = [calls.index(name) for name in ("stage_weights", "logprobs", "pause", "send_weights", "score")]
    assert order == sorted(order)


async def test_a_probe_that_has_grown_since_is_scored_again():
    subject, trainer = sync(Engine())
    expected = await subject.canary.expect()
    trainer.calls.clear()
    await subject.canary.check([0], replay=False, expected=expected)
    assert "logprobs" not in trainer.calls
    subject.canary._probe = [*subject.canary._probe, np.arange(5, dtype=np.int32)]
    await subject.canary.check([0], replay=False, expected=expected)
    assert "logprobs" in trainer.calls
