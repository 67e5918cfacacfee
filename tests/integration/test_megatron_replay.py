"""The routers of a real trainer on the CPU execute the routed experts that they replay, in recomputation too."""

from dataclasses import replace

import numpy as np
import pytest

from async_rl.errors import ReplayError
from tests.support.groups import with_trajectories
from tests.support.one_rank import (
    SPEC,
    Opened,
    as_map,
    assert_close,
    make_groups,
    random_rows,
    sequences,
    step,
    train_once,
)

pytestmark = pytest.mark.megatron


def replay_and_fall_back(path):
    ids = sequences(1)
    rows = random_rows(59)
    with Opened(path) as (trainer, executed):
        native = trainer.logprobs(ids)[0]
        native_maps = executed[:]
        executed.clear()
        forced = trainer.logprobs(ids, [rows])[0]
        forced_maps = executed[:]
        executed.clear()
        holes = rows.astype(np.int32)
        holes[10:20] = -1
        trainer.logprobs(ids, [holes])
        return native, native_maps, forced, forced_maps, executed, rows


def test_invariant_8_replay_is_what_was_asked_and_a_row_without_routing_falls_back_alone(ranks, models):
    native, native_maps, forced, forced_maps, hole_maps, rows = ranks.call(replay_and_fall_back, models / "moe")
    assert len(native_maps) == len(forced_maps) == len(hole_maps) == SPEC.num_moe_layers
    for layer in range(SPEC.num_moe_layers):
        asked = as_map(rows[:, layer])
        assert (forced_maps[layer] == asked).all()
        assert (native_maps[layer] != asked).any(axis=1).mean() > 0.5, "the test must ask for other experts"
        assert (hole_maps[layer][:10] == asked[:10]).all()
        assert (hole_maps[layer][20:] == asked[20:]).all()
        assert (hole_maps[layer][10:20] != asked[10:20]).any()
    # In the first layer nothing before a row depends on routing, so the fallback rows choose as they do
    # without replay.
    assert (hole_maps[0][10:20] == native_maps[0][10:20]).all()
    assert np.abs(native - forced).max() > 1e-2


def replay_faults(path):
    messages = []
    with Opened(path) as (trainer, _):
        for fault in ("rows", "range", "duplicate", "layers"):
            rows = random_rows(59)
            if fault == "rows":
                rows = rows[:-1]
            elif fault == "range":
                rows[7, 1, 0] = 6
            elif fault == "duplicate":
                rows[3, 2] = 4
            else:
                rows = rows[:, :2]
            try:
                trainer.logprobs(sequences(1), [rows])
            except ReplayError as error:
                messages.append(str(error))
    return messages


def test_routing_that_cannot_be_replayed_is_refused_with_its_place(ranks, models):
    rows, outside, duplicate, layers = ranks.call(replay_faults, models / "moe")
    assert "shape (58, 3, 2), the model needs (59, 3, 2)" in rows
    assert "row 7, MoE layer 1" in outside
    assert "0 to 5" in outside
    assert "row 3, MoE layer 2: expert repeated in [4, 4]" in duplicate
    assert "shape (59, 2, 2)" in layers


def train_with_a_router_that_ignores_replay(path):
    from async_rl.trainer.megatron import replay

    original = replay._RowwiseReplay.get_replay_topk

    def native(_self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

    replay._RowwiseReplay.get_replay_topk = native
    try:
        with Opened(path, trainer__router_replay="R3", trainer__verify_replay_steps=1) as (trainer, _):
            step(trainer, make_groups())
    finally:
        replay._RowwiseReplay.get_replay_topk = original


def test_invariant_8_verification_notices_a_router_that_does_something_else(ranks, models):
    with pytest.raises(ReplayError, match="executed other experts than asked for"):
        ranks.call(train_with_a_router_that_ignores_replay, models / "moe")


def test_full_recomputation_replays_the_same_rows(ranks, models):
    groups = make_groups()
    groups[0] = with_trajectories(groups[0], lambda t: replace(t, routed_experts=None, routing_spec=None))
    r3 = {"trainer__router_replay": "R3", "trainer__tokens_per_microbatch": 60}
    plain, gradients, weights, calls = ranks.call(train_once, models / "moe", groups, r3)
    again, recomputed, recomputed_weights, more_calls = ranks.call(
        train_once, models / "moe", groups, {**r3, "trainer__recompute": "full"}
    )
    assert more_calls == 2 * calls, "recomputation must really run the routers again"
    assert_close(recomputed, gradients, rtol=1e-6, atol=1e-8)
    assert_close(recomputed_weights, weights, rtol=1e-6, atol=1e-8)
    fallback = sum(t.num_tokens - 1 for t in groups[0].trajectories)
    assert plain.router_fallback_rows == again.router_fallback_rows == fallback
    native = ranks.call(train_once, models / "moe", groups, {})[0]
    assert abs(native.agreement.kl - plain.agreement.kl) > 1e-3, "forced experts must change what is computed"


def microbatches_in_flight(path):
    """Make two forward passes before the first backward pass, as a pipeline schedule does."""
    import torch

    with Opened(path, trainer__recompute="full") as (trainer, _):
        replay = trainer._executor._replay
        router = replay._routers[0][0][1].router_replay
        cu_seqlens = np.array([0, 4], np.int32)
        scores = torch.zeros(4, SPEC.num_experts)

        def chosen():
            return router.get_replay_topk(scores, SPEC.top_k, None, None, lambda s, k, **_: s.topk(k))[1].tolist()

        rows = [random_rows(4, seed).astype(np.int32) for seed in (1, 2)]
        forward, backward = [], []
        with replay.schedule():
            for target in rows:
                replay.before_forward(target, cu_seqlens)
                forward.append(chosen())
                replay.after_forward()
            backward = [chosen() for _ in rows]
            replay.before_forward(rows[0], cu_seqlens)
        left = router.target_topk_idx, router.replay_backward_list, router.router_replay_action
        return [target[:, 0].tolist() for target in rows], forward, backward, left


def test_recomputation_takes_rows_in_order_and_nothing_survives_the_schedule(ranks, models):
    asked, forward, backward, left = ranks.call(microbatches_in_flight, models / "moe")
    assert forward == backward == asked
    assert left == (None, [], None)


def targets_kept(path, recompute):
    """Return how many targets each router keeps as a backward pass begins and in a pass alone, and the types given."""
    kept, types = [], set()
    with Opened(path, trainer__router_replay="R3", trainer__tokens_per_microbatch=60, **recompute) as (trainer, _):
        executor = trainer._executor
        replays = [router.router_replay for _, router in executor._replay._routers[0]]
        armed = executor._replay.before_forward

        def before_forward(routed_experts, *arguments):
            types.add(str(routed_experts.dtype))
            armed(routed_experts, *arguments)
            kept.append({len(replay.replay_backward_list) for replay in replays})
            types.update(str(replay.target_topk_idx.dtype) for replay in replays)

        executor._replay.before_forward = before_forward
        step(trainer, make_groups())
        trained, kept = kept, []
        trainer.logprobs(sequences(1) * 2, [random_rows(59)] * 2)
        return trained, kept, types


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        ({}, 0),
        ({"trainer__recompute": "selective", "trainer__recompute_modules": ("core_attn",)}, 0),
        ({"trainer__recompute": "selective", "trainer__recompute_modules": ("moe",)}, 1),
        ({"trainer__recompute": "full"}, 1),
    ],
)
def test_targets_are_small_and_kept_only_for_a_recomputation(ranks, models, recompute, expected):
    trained, passes, types = ranks.call(targets_kept, models / "moe", recompute)
    assert trained == [{expected}] * len(trained)
    assert len(trained) > 1
    assert passes == [{0}] * len(passes)
    assert types == {"int16", "torch.int16"}


def record_then_train(path):
    groups = make_groups(routing=False)
    with Opened(path, trainer__router_replay="R2", trainer__optimizer__lr=0.3) as (trainer, executed):
        trainer.prepare(groups, oldest_version=0)
        recorded = executed[:]
        ids = [np.concatenate([t.prompt_ids, t.response_ids]) for g in groups for t in g.trajectories]
        trainer.supervised_step([(x, np.ones(len(x), bool)) for x in ids])  # other weights, other native routing
        executed.clear()
        report = step(trainer, groups)
        replayed = executed[:]
        executed.clear()
        trainer.prepare(groups, oldest_version=0)
        native = executed[:]
        executed.clear()
        unrecorded = step(trainer, make_groups(routing=False, seed=5, epoch=1))
        return recorded, replayed, native, report, unrecorded, len(executed)


def test_r2_replays_the_routing_of_the_logprob_pass(ranks, models):
    recorded, replayed, native, report, unrecorded, calls = ranks.call(record_then_train, models / "moe")
    assert len(recorded) == len(replayed) == SPEC.num_moe_layers
    for then, now, otherwise in zip(recorded, replayed, native, strict=True):
        assert (then == now).all()
        assert (then != otherwise).any(), "the weights must have moved enough to route differently"
    assert report.router_fallback_rows == 0
    # A step on groups that were not recorded runs the pass itself first.
    assert calls == 2 * SPEC.num_moe_layers
    assert unrecorded.seconds["record_routing"] > 0


def native_then_changed(path, changed, overrides):
    """Return the reports of a step on the experts that the trainer's own router chooses, and of one with others.

    In the second, ``changed`` rows of each response have another expert in the last MoE layer. Weights do not move.
    """
    groups = make_groups()
    still = {"trainer__router_replay": "R3", "trainer__optimizer__lr": 1e-12, "trainer__tokens_per_microbatch": 60}
    with Opened(path, **still, **overrides) as (trainer, _):

        def routed(change):
            return [with_trajectories(g, lambda t: replace(t, routed_experts=change(t))) for g in groups]

        def native(t):
            return trainer.native_routing([np.concatenate([t.prompt_ids, t.response_ids])])[0].astype(np.uint8)

        def other(t):
            rows = native(t)
            for row in rows[:changed]:
                row[-1, 0] = next(expert for expert in range(SPEC.num_experts) if expert not in row[-1])
            return rows

        own, shifted = routed(native), routed(other)
        rows = sum(len(t.routed_experts) for g in own for t in g.trajectories)
        # One response without routing: the router's own choice is not a replayed one.
        first = shifted[0].trajectories[0]
        without = replace(first, routed_experts=None, routing_spec=None)
        absent = with_trajectories(shifted[0], lambda t: without if t is first else t)
        batches = {"native": own, "changed": shifted, "one without": [absent, *shifted[1:]]}
        reports = {name: step(trainer, batch) for name, batch in batches.items()}
        return reports, rows, len(first.routed_experts)


@pytest.mark.parametrize("overrides", [{}, {"trainer__recompute": "full"}, {"trainer__microbatch_multiple": 64}])
def test_choices_that_the_trainers_own_router_would_not_have_made_are_counted(ranks, models, overrides):
    reports, rows, first = ranks.call(native_then_changed, models / "moe", 3, overrides)
    choices = SPEC.num_moe_layers * SPEC.top_k
    assert reports["native"].router_disagreement == 0
    assert reports["changed"].router_disagreement == pytest.approx(9 * 3 / (rows * choices))
    assert reports["one without"].router_disagreement == pytest.approx(8 * 3 / ((rows - first) * choices))
    off = ranks.call(train_once, models / "moe", make_groups(), {"trainer__router_replay": "off"})[0]
    assert off.router_disagreement is None
