"""WeightSync against scripted sides: when a sync is retried, what a mismatch says, which experts are probed."""

import asyncio

import numpy as np
import pytest

from async_rl.errors import ReplicaFailed, WeightSyncError, WeightSyncMismatch
from async_rl.weights.canary import SEQUENCES
from tests.support.scripted_sync import EXPERTS, VOCAB, Engine, Slow, fleet, settled, sync


async def test_invariant_10_a_sync_that_arrives_is_made_once():
    subject, _ = sync(engine := Engine())
    await subject.begin()
    engine.calls.clear()
    record = await subject.run(1)
    assert (record.canary, record.retries, record.unreached_experts) == (0.0, {}, 0)
    assert engine.calls == ["init", "pause", "receive", "wake", "score", "resume"]
    assert set(record.phases) == {"pause", "transfer", "canary"}


async def test_a_sync_that_arrives_wrong_is_tried_once_more():
    subject, _ = sync(engine := Engine(wrong=2))
    record = await subject.run(1)
    assert record.retries == {"canary": 1}
    assert engine.calls.count("receive") == 2
    # The engine is paused for the second transfer as it was for the first.
    assert [call for call in engine.calls if call in ("pause", "wake")] == ["pause", "wake"] * 2


@pytest.mark.parametrize("layer", [0, 1, 2])
async def test_invariant_10_a_second_mismatch_ends_the_run_and_names_the_layer(layer):
    subject, _ = sync(engine := Engine(wrong=9, layer=layer))
    with pytest.raises(
        WeightSyncMismatch, match=f"differs most in layer {layer} .*the first to differ is layer {layer}"
    ):
        await subject.run(1)
    assert engine.calls.count("receive") == 2
    assert "resume" not in engine.calls


async def test_in_bfloat16_the_engines_routing_is_replayed_at_every_sync():
    """Near-ties always fall differently there, and a tolerance wide enough for them would hide what it is for."""
    for dtype, passes in (("float32", 1), ("bfloat16", 2)):
        subject, trainer = sync(Engine(), model={"path": "m", "dtype": dtype})
        await subject.run(1)
        assert trainer.calls.count("logprobs") == passes


async def test_engines_that_route_alike_cost_the_trainer_one_pass_together():
    """A pass for each of some hundred replicas would take longer than the rest of a weight sync."""
    subject, trainer, engines = fleet(4, model={"path": "m", "dtype": "bfloat16"})
    await subject.run(1)
    assert trainer.calls.count("logprobs") == 2, "its own routing, and that of the engines"
    # Weights are new at each sync, so nothing of the one before may be used.
    engines[2].renumber = 1
    trainer.calls.clear()
    await subject.run(2)
    assert trainer.calls.count("logprobs") == 3, "an engine that routes in another way needs its own"


async def test_routed_experts_that_are_large_are_fetched_once_of_engines_that_route_alike():
    subject, trainer, engines = fleet(4, model={"path": "m", "dtype": "bfloat16"})
    await subject.begin()
    for engine in engines.values():
        engine.leaves = True
    trainer.calls.clear()
    record = await subject.run(1)
    assert sum(engine.calls.count("probed_routing") for engine in engines.values()) == 1
    assert (trainer.calls.count("logprobs"), record.canary) == (2, 0.0)
    engines[3].renumber = 1
    await subject.run(2)
    assert sum(engine.calls.count("probed_routing") for engine in engines.values()) == 3


async def test_a_replica_that_dies_before_it_gives_its_routed_experts_is_named_and_the_others_are_synced():
    subject, _, engines = fleet(3)
    for engine in engines.values():
        engine.leaves = True
    engines[0].dead = "probed_routing"
    with pytest.raises(ReplicaFailed, match="rollout-0"):
        await subject.run(1)
    assert [engine.calls.count("resume") for engine in engines.values()] == [0, 1, 1]


async def test_each_replica_takes_what_was_staged_for_it():
    subject, trainer, engines = fleet(3)
    taken = {}
    for replica, engine in engines.items():
        engine.do_receive = lambda update, version, replica=replica: taken.update({replica: update})

    async def stage_weights():
        return [{"file of": list(engines.values()).index(engine)} for engine in trainer.workers]

    trainer.stage_weights = stage_weights
    subject.members = dict(reversed(subject.members.items()))
    await subject.run(1)
    subject.members = dict(reversed(subject.members.items()))  # the same replicas, connected in the other order
    await subject.run(2)
    assert taken == {replica: {"file of": replica} for replica in engines}


async def test_in_flight_generations_cannot_be_undone_so_nothing_is_tried_again():
    mode = {"async_training": {"partial_rollout": {"mode": "in_flight"}}}
    subject, _ = sync(engine := Engine(wrong=2), **mode)
    with pytest.raises(WeightSyncMismatch):
        await subject.run(1)
    assert engine.calls.count("receive") == 1


async def test_expert_ids_in_another_numbering_are_refused_at_the_start_under_r3_only():
    subject, _ = sync(Engine(renumber=1))
    with pytest.raises(
        WeightSyncMismatch, match=r"number experts.*differently.*differs most in layer 0 \(100% of rows\), layer 2"
    ):
        await subject.begin()
    subject, _ = sync(Engine(renumber=1), trainer={"router_replay": "R2"})
    await subject.begin()


async def test_an_engine_that_is_off_at_the_start_gets_no_weights():
    subject, _ = sync(engine := Engine(wrong=1))
    with pytest.raises(WeightSyncMismatch, match="layer 1"):
        await subject.begin()
    assert "receive" not in engine.calls


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


@pytest.mark.parametrize("call", ["pause", "receive", "wake", "score", "resume"])
async def test_a_replica_that_dies_during_a_sync_is_named_and_costs_the_others_nothing(call):
    subject, trainer, engines = fleet(3)
    engines[1].dead = call
    with pytest.raises(ReplicaFailed, match="rollout-1") as failed:
        await subject.run(1)
    assert failed.value.replica == 1
    # The caller syncs again without it, and finds nothing left to do.
    del subject.members[1]
    record = await subject.run(1)
    assert (record.policy_version, record.retries) == (1, {})
    assert [engine.calls.count("resume") for engine in engines.values()] == [1, 0, 1]
    assert [engine.calls.count("pause") for engine in engines.values()] == [1, call != "pause", 1]
    assert trainer.staged == 1


@pytest.mark.parametrize("call", ["pause", "receive", "wake", "score"])
async def test_where_the_trainer_sends_a_death_before_the_transfer_costs_all_another_one(call):
    subject, _, engines = fleet(3, sends=True)
    engines[1].dead = call
    with pytest.raises(ReplicaFailed, match="rollout-1"):
        await subject.run(1)
    sent = call in ("wake", "score")
    assert [engine.calls.count("resume") for engine in engines.values()] == [sent, 0, sent]
    del subject.members[1]
    await subject.run(1)
    assert [engine.calls.count("resume") for engine in engines.values()] == [1, 0, 1]
    assert all(engines[replica].pushes == 1 + (call == "receive" and replica == 0) for replica in (0, 2))
    assert subject.needs_trainer


async def test_a_replica_that_takes_the_place_of_a_dead_one_is_brought_to_the_version():
    subject, _, engines = fleet(2)
    engines[1].dead = "score"
    with pytest.raises(ReplicaFailed):
        await subject.run(1)
    subject.members[1] = Engine()
    await subject.run(1)
    assert [engine.calls.count("receive") for engine in subject.members.values()] == [1, 1]
    await subject.run(2)
    assert [engine.calls.count("receive") for engine in subject.members.values()] == [2, 2]


@pytest.mark.parametrize("call", ["pause", "receive", "wake", "score"])
async def test_an_engine_resumes_as_soon_as_its_own_canary_agreed(call):
    subject, trainer, engines = fleet(3)
    slow = subject.members[1] = Slow(call)
    syncing = asyncio.ensure_future(subject.run(1))
    await settled()
    assert [engines[replica].calls[-1] for replica in (0, 2)] == ["resume", "resume"]
    assert "resume" not in slow.calls
    assert not syncing.done()
    trainer.calls.clear()
    slow.may_answer.set()
    record = await syncing
    assert slow.calls[-1] == "resume"
    assert trainer.calls == [], "it may compute meanwhile"
    # The record has the phases of one replica, the slowest.
    assert set(record.phases) == {"pause", "transfer", "canary"}


async def test_replicas_that_are_held_wait_for_each_other():
    subject, _, engines = fleet(2)
    subject.members[1] = slow = Slow("score")
    syncing = asyncio.ensure_future(subject.run(1, held=True))
    await settled()
    slow.may_answer.set()
    await syncing
    assert not any("resume" in engine.calls for engine in (engines[0], slow))
    await subject.resume()
    assert all(engine.calls[-1] == "resume" for engine in (engines[0], slow))


@pytest.mark.parametrize("sends", [False, True])
async def test_a_replica_that_disagrees_stays_paused_and_alone_is_tried_again(sends):
    subject, trainer, engines = fleet(3, sends=sends)
    engines[1].wrong = 2
    resumed = []
    for replica, engine in engines.items():
        engine.do_resume = lambda replica=replica: resumed.append((replica, engines[replica].pushes))
    record = await subject.run(1)
    assert record.retries == {"canary": 1}
    # With a broadcast that reaches all of them, the others are paused for it again.
    again = [(0, 2), (1, 2), (2, 2)] if sends else [(1, 2)]
    assert resumed == [(0, 1), (2, 1), *again]
    engines[1].wrong = 99
    resumed.clear()
    with pytest.raises(WeightSyncMismatch, match="replica 1 "):
        await subject.run(2)
    assert {replica for replica, _ in resumed} == {0, 2}
    assert trainer.calls.count("stage_weights") == 4


async def test_the_caller_is_notified_once_when_no_replica_has_old_weights_any_more():
    subject, _, engines = fleet(2)
    subject.members[1] = slow = Slow("pause")
    notified = []

    async def all_paused():
        notified.append([engine.calls[-1] for engine in (engines[0], slow)])

    syncing = asyncio.ensure_future(subject.run(1, all_paused=all_paused))
    await settled()
    assert notified == []
    slow.may_answer.set()
    await syncing
    assert [calls[0] for calls in notified] == ["resume"]
    assert "pause" in slow.calls
    # One that dies before is not waited for, once it is known to be dead.
    engines[0].dead = "pause"
    with pytest.raises(ReplicaFailed):
        await subject.run(2, all_paused=all_paused)
    assert len(notified) == 1
    del subject.members[0]
    await subject.run(2, all_paused=all_paused)
    assert len(notified) == 2


async def test_a_fault_of_the_caller_while_all_are_paused_ends_the_sync():
    async def all_paused():
        raise ValueError("the queue is gone")

    with pytest.raises(ValueError, match="the queue is gone"):
        await fleet(2)[0].run(1, all_paused=all_paused)


@pytest.mark.parametrize("call", ["pause", "receive", "score"])
async def test_an_engine_that_does_not_respond_is_named(call, monkeypatch):
    monkeypatch.setattr("async_rl.runtime.timeouts.ANSWER_S", 0.05)
    subject, _, engines = fleet(2, sync={"timeout_s": 0.1})
    engines[0].hangs = call
    with pytest.raises(ReplicaFailed, match=f"rollout-0: engine did not respond to `{call}`"):
        await subject.run(1)
    engines[0].hangs = "unanswered"
    with pytest.raises(ReplicaFailed, match=r"rollout-0: process did not respond within 0\.05 s"):
        await subject.raise_failed()


async def test_a_sync_that_takes_too_long_without_a_failed_replica_says_what_to_do():
    subject, trainer, engines = fleet(1, sync={"timeout_s": 0.05})

    async def slow(*_):
        await asyncio.sleep(3600)

    trainer.connect = slow
    with pytest.raises(WeightSyncError, match=r"longer than sync\.timeout_s = 0\.05 s; finished phases: none"):
        await subject.run(1)
    assert "resume" not in engines[0].calls


async def test_a_transfer_that_is_cut_is_retried_over_a_new_connection():
    subject, trainer, _ = fleet(2, sends=True)
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
    subject, _, engines = fleet(3, sync={"rolling": True})
    order = []
    for replica, engine in engines.items():
        for name in ("pause", "resume"):
            setattr(engine, f"do_{name}", lambda *, event=(name, replica), **_: order.append(event))
    snapshots = []

    async def paused(replica):
        snapshots.append(replica)
        order.append(("snapshot", replica))

    async def all_paused():
        order.append("all")

    record = await subject.run(1, paused=paused, all_paused=all_paused)
    assert order.pop() == "all"
    assert order == [(event, replica) for replica in range(3) for event in ("pause", "snapshot", "resume")]
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
    order = [calls.index(name) for name in ("stage_weights", "logprobs", "pause", "receive", "score")]
    assert order == sorted(order)


async def test_a_probe_that_has_grown_since_is_scored_again():
    subject, trainer = sync(Engine())
    expected = await subject.canary.expect()
    trainer.calls.clear()
    await subject.canary.compare(0, expected)
    assert "logprobs" not in trainer.calls
    subject.canary._probe = [*subject.canary._probe, np.arange(5, dtype=np.int32)]
    await subject.canary.compare(0, expected)
    assert "logprobs" in trainer.calls
