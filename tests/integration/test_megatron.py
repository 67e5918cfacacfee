"""The Megatron trainer for real, on CPU: against Hugging Face, under replay, recomputation and data parallelism.

Megatron's state is global and its patches for the CPU reach into torch, so no model is built in the test
process: one worker process serves the module, and the data-parallel test starts two of its own.
"""

import json
import shutil
import socket
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from ranks import run_config

from async_rl.errors import ModelError, ReplayError
from async_rl.trainer.packing import split_over_ranks
from async_rl.types import Group, Prompt, RoutingSpec, Segment, Trajectory

pytestmark = pytest.mark.megatron

# Layer 1 is dense: a shift between layers and MoE layers would show.
SPEC = RoutingSpec(num_moe_layers=3, top_k=2, num_experts=6)
VOCAB = 40
TIMEOUT_S = 120


# ---- made in the worker ----


def make_checkpoints(folder):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,  # ten times the usual: logits and routers that are not degenerate
    }
    experts = {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    }
    models = {
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, num_hidden_layers=4, norm_topk_prob=True)),
        "pre_softmax": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape, **experts, num_hidden_layers=4, norm_topk_prob=False)
        ),
        "dense": Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=2, tie_word_embeddings=True, rope_theta=5e5)),
    }
    for name, model in models.items():
        model.float().save_pretrained(folder / name)


def hf_logprobs(path, sequences, temperature=1.0):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    result = []
    for ids in sequences:
        with torch.no_grad():
            logits = model(torch.from_numpy(ids).long()[None]).logits[0, :-1] / temperature
        result.append(logits.log_softmax(-1).gather(-1, torch.from_numpy(ids).long()[1:, None])[:, 0].numpy())
    return result


class Opened:
    """A Trainer that is closed again, and the maps that its routers really executed."""

    def __init__(self, path, rank=0, init_method=None, **overrides):
        import torch

        from async_rl.trainer.trainer import Trainer

        torch.set_num_threads(1)
        self.trainer = Trainer(run_config(path, **overrides), rank=rank, init_method=init_method)
        self.executed = []  # bool[T, E] per call of a router, in order

    def __enter__(self):
        from megatron.core.transformer.moe.router import TopKRouter

        for module in self.trainer._chunks[0].modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(lambda _m, _i, output: self.executed.append(output[1].numpy().copy()))
        return self.trainer, self.executed

    def __exit__(self, *_):
        self.trainer.close()


def parameters(trainer, what="data"):
    return {name: getattr(p, what).detach().numpy().copy() for name, p in trainer._chunks[0].module.named_parameters()}


def sequences(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (60, 2, 1, 33, 17)[:count]]


def random_rows(rows, seed=0):
    """Distinct experts, nothing like what a router would choose: uint8[rows, L, K]."""
    order = np.random.default_rng(seed).random((rows, SPEC.num_moe_layers, SPEC.num_experts)).argsort(-1)
    return order[..., : SPEC.top_k].astype(np.uint8)


def as_map(rows):
    """Experts [T, K] to bool[T, E]."""
    mapped = np.zeros((len(rows), SPEC.num_experts), bool)
    np.put_along_axis(mapped, rows.astype(np.int64), True, axis=1)
    return mapped


def make_groups(count=3, n=3, version=4, routing=True, seed=0, epoch=0):
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        prompt = Prompt(f"{epoch}-{g}", g + 1, "", rng.integers(0, VOCAB, 6).astype(np.int32), fields={})
        trajectories = []
        for t in range(n):
            length = int(rng.integers(6, 30))
            cut = length // 2
            trajectories.append(
                Trajectory(
                    trajectory_id=f"{epoch}-{g}.0/{t}",
                    prompt_ids=prompt.token_ids,
                    response_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                    logprobs=rng.normal(-3.5, 0.2, length).astype(np.float32),
                    versions=np.repeat([version - 2, version], [cut, length - cut]).astype(np.int32),
                    segments=(Segment(0, cut, version - 2), Segment(cut, length, version)),
                    reward=float(rng.random()),
                    finish_reason="stop",
                    routed_experts=random_rows(6 + length - 1, seed + 100 * g + t) if routing else None,
                    routing=SPEC if routing else None,
                )
            )
        groups.append(Group(f"{epoch}-{g}.0", prompt, tuple(trajectories)))
    return groups


def step(trainer, groups, oldest_version=2):
    return trainer.train_step(groups, version=4, oldest_version=oldest_version)


# ---- fixtures ----


@pytest.fixture(scope="module")
def worker():
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def models(worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    worker(make_checkpoints, folder)
    return folder


# ---- the model ----


def megatron_logprobs(path, ids, temperature, tokens_per_microbatch):
    with Opened(path, trainer__tokens_per_microbatch=tokens_per_microbatch) as (trainer, _):
        return trainer.logprobs(ids, temperature=temperature)


@pytest.mark.parametrize("name", ["moe", "pre_softmax", "dense"])
@pytest.mark.parametrize(("temperature", "budget"), [(1.0, 8192), (0.7, 40)])
def test_logprobs_equal_those_of_transformers(worker, models, name, temperature, budget):
    ids = sequences()
    expected = worker(hf_logprobs, models / name, ids, temperature)
    got = worker(megatron_logprobs, models / name, ids, temperature, budget)
    assert [len(x) for x in got] == [len(x) for x in expected] == [len(x) - 1 for x in ids]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert np.ptp(np.concatenate(expected)) > 1, "degenerate logits prove nothing"


def export_and_compare(path, folder):
    import torch
    from safetensors.torch import load_file

    with Opened(path) as (trainer, _):
        trainer.save_hf(folder)
        source = trainer.weight_source()
        metadata = [(m.name, m.dtype, m.shape) for m in source.metadata()]
        streamed = [(name, t.dtype, tuple(t.shape)) for name, t in source]
        tensors = {name: t.clone() for name, t in source}
    original = load_file(path / "model.safetensors")
    saved = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    same = all(
        set(original) == set(other) and all(torch.equal(original[k], other[k]) for k in original)
        for other in (saved, tensors)
    )
    return same, metadata == streamed, len(metadata) == len(original)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_export_is_the_checkpoint_bit_for_bit(worker, models, tmp_path, name):
    assert worker(export_and_compare, models / name, tmp_path / "out") == (True, True, True)
    ids = sequences(1)
    assert worker(hf_logprobs, tmp_path / "out", ids)[0] == pytest.approx(
        worker(hf_logprobs, models / name, ids)[0], abs=0
    )


def open_and_close(path):
    with Opened(path):
        pass


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_tensors_named(worker, models, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(models / "moe", broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    tensors["model.layers.9.extra"] = np.zeros(1, np.float32)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        worker(open_and_close, broken)
    for words in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.norm.weight is [47], expected [48]",
        "model.layers.9.extra is surplus",
    ):
        assert words in str(error.value)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_local_experts": 5, "num_experts": 5}))
    with pytest.raises(ModelError, match=r"experts\.5\.\S+ is surplus|expected \[5, 48\]"):
        worker(open_and_close, broken)


# ---- replay ----


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


def test_invariant_8_replay_is_what_was_asked_and_a_row_without_routing_falls_back_alone(worker, models):
    native, native_maps, forced, forced_maps, hole_maps, rows = worker(replay_and_fall_back, models / "moe")
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


def test_routing_that_cannot_be_replayed_is_refused_with_its_place(worker, models):
    rows, outside, duplicate, layers = worker(replay_faults, models / "moe")
    assert "shape (58, 3, 2), the model needs (59, 3, 2)" in rows
    assert "row 7, MoE layer 1" in outside
    assert "0 to 5" in outside
    assert "row 3, MoE layer 2: expert repeated in [4, 4]" in duplicate
    assert "shape (59, 2, 2)" in layers


def train_with_a_router_that_ignores_replay(path):
    from async_rl.trainer import replay

    original = replay._RowwiseReplay.get_replay_topk

    def native(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

    replay._RowwiseReplay.get_replay_topk = native
    try:
        with Opened(path, trainer__router_replay="R3", trainer__verify_replay_steps=1) as (trainer, _):
            step(trainer, make_groups())
    finally:
        replay._RowwiseReplay.get_replay_topk = original


def test_invariant_8_verification_notices_a_router_that_does_something_else(worker, models):
    with pytest.raises(ReplayError, match="executed other experts than asked for"):
        worker(train_with_a_router_that_ignores_replay, models / "moe")


def train_once(path, groups, overrides, oldest_version=2):
    with Opened(path, **overrides) as (trainer, executed):
        report = step(trainer, groups, oldest_version)
        return report, parameters(trainer, "main_grad"), parameters(trainer), len(executed)


def assert_same_agreement(got, wanted):
    assert got.tokens == wanted.tokens
    for field in ("kl", "abs_mean", "abs_max"):
        assert getattr(got, field) == pytest.approx(getattr(wanted, field), rel=1e-4, abs=1e-6), field


def assert_close(got, expected, rtol=1e-5, atol=1e-7):
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


def test_full_recomputation_replays_the_same_rows(worker, models):
    groups = make_groups()
    groups[0] = replace(
        groups[0],
        trajectories=tuple(replace(t, routed_experts=None, routing=None) for t in groups[0].trajectories),
    )
    r3 = {"trainer__router_replay": "R3", "trainer__tokens_per_microbatch": 60}
    plain, gradients, weights, calls = worker(train_once, models / "moe", groups, r3)
    again, recomputed, recomputed_weights, more_calls = worker(
        train_once, models / "moe", groups, {**r3, "trainer__recompute": "full"}
    )
    assert more_calls == 2 * calls, "recomputation must really run the routers again"
    assert_close(recomputed, gradients, rtol=1e-6, atol=1e-8)
    assert_close(recomputed_weights, weights, rtol=1e-6, atol=1e-8)
    fallback = sum(t.num_tokens - 1 for t in groups[0].trajectories)
    assert plain.router_fallback_rows == again.router_fallback_rows == fallback
    native = worker(train_once, models / "moe", groups, {})[0]
    assert abs(native.agreement.kl - plain.agreement.kl) > 1e-3, "forced experts must change what is computed"


def microbatches_in_flight(path):
    """Two forward passes before the first backward pass, as a pipeline schedule has them."""
    import torch

    with Opened(path) as (trainer, _):
        replay = trainer._executor._replay
        router = replay._routers[0][0][1].router_replay
        cu_seqlens = np.array([0, 4], np.int32)
        scores = torch.zeros(4, SPEC.num_experts)

        def chosen():
            return router.get_replay_topk(scores, SPEC.top_k, None, None, lambda s, k, **_: s.topk(k))[1].tolist()

        rows = [torch.from_numpy(random_rows(4, seed).astype(np.int32)) for seed in (1, 2)]
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


def test_recomputation_takes_rows_in_order_and_nothing_survives_the_schedule(worker, models):
    asked, forward, backward, left = worker(microbatches_in_flight, models / "moe")
    assert forward == backward == asked
    assert left == (None, [], None)


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


def test_r2_replays_the_routing_of_the_logprob_pass(worker, models):
    recorded, replayed, native, report, unrecorded, calls = worker(record_then_train, models / "moe")
    assert len(recorded) == len(replayed) == SPEC.num_moe_layers
    for then, now, otherwise in zip(recorded, replayed, native, strict=True):
        assert (then == now).all()
        assert (then != otherwise).any(), "the weights must have moved enough to route differently"
    assert report.router_fallback_rows == 0
    # A step on groups that were not recorded runs the pass itself first.
    assert calls == 2 * SPEC.num_moe_layers
    assert unrecorded.seconds["record_routing"] > 0


def native_then_changed(path, changed, overrides):
    """Reports of a step on the routing that the trainer's own router chooses, and of one in which the last MoE layer
    of ``changed`` rows of each response has one expert another. Weights do not move."""
    groups = make_groups()
    still = {"trainer__router_replay": "R3", "trainer__optimizer__lr": 1e-12, "trainer__tokens_per_microbatch": 60}
    with Opened(path, **still, **overrides) as (trainer, _):

        def routed(change):
            return [
                replace(g, trajectories=tuple(replace(t, routed_experts=change(t)) for t in g.trajectories))
                for g in groups
            ]

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
        without = replace(first, routed_experts=None, routing=None)
        absent = replace(shifted[0], trajectories=(without, *shifted[0].trajectories[1:]))
        batches = {"native": own, "changed": shifted, "one without": [absent, *shifted[1:]]}
        reports = {name: step(trainer, batch) for name, batch in batches.items()}
        return reports, rows, len(first.routed_experts)


@pytest.mark.parametrize("overrides", [{}, {"trainer__recompute": "full"}, {"trainer__microbatch_multiple": 64}])
def test_choices_that_the_trainers_own_router_would_not_have_made_are_counted(worker, models, overrides):
    reports, rows, first = worker(native_then_changed, models / "moe", 3, overrides)
    choices = SPEC.num_moe_layers * SPEC.top_k
    assert reports["native"].router_disagreement == 0
    assert reports["changed"].router_disagreement == pytest.approx(9 * 3 / (rows * choices))
    assert reports["one without"].router_disagreement == pytest.approx(8 * 3 / ((rows - first) * choices))
    off = worker(train_once, models / "moe", make_groups(), {"trainer__router_replay": "off"})[0]
    assert off.router_disagreement is None


# ---- steps ----


def test_exact_views_whose_routing_is_that_of_the_whole_make_the_update_of_the_whole(worker, models):
    """Each token is trained once, in its own context; and what the prefixes cost is counted."""
    groups = make_groups()
    r3, exact = {"trainer__router_replay": "R3"}, {"async_training__partial_rollout__routing": "exact"}
    own = [
        replace(
            group,
            trajectories=tuple(
                replace(
                    t,
                    segments=tuple(
                        replace(s, routed_experts=t.routed_experts[: len(t.prompt_ids) + s.stop - 1])
                        for s in t.segments[:-1]
                    )
                    + t.segments[-1:],
                )
                for t in group.trajectories
            ),
        )
        for group in groups
    ]
    whole = worker(train_once, models / "moe", groups, r3)
    views = worker(train_once, models / "moe", own, r3 | exact)
    assert_close(views[1], whole[1], rtol=1e-4, atol=1e-7)
    assert_same_agreement(views[0].agreement, whole[0].agreement)
    first_segments = sum(len(t.prompt_ids) + t.segments[0].stop - 1 for g in groups for t in g.trajectories)
    assert (whole[0].extra_positions, views[0].extra_positions) == (0, first_segments)
    # Another routing for the first segments changes what is computed for them, and for nobody else.
    changed = [
        replace(
            group,
            trajectories=tuple(
                replace(
                    t,
                    segments=(
                        replace(t.segments[0], routed_experts=t.segments[0].routed_experts[::-1].copy()),
                        *t.segments[1:],
                    ),
                )
                for t in group.trajectories
            ),
        )
        for group in own
    ]
    other = worker(train_once, models / "moe", changed, r3 | exact)[0].agreement_by_resume_position
    same = views[0].agreement_by_resume_position
    assert abs(other["before"].kl - same["before"].kl) > 1e-3
    for position in ("first", "after"):
        assert_same_agreement(other[position], same[position])


@pytest.mark.parametrize("mode", ["R3", "R2", "off"])
def test_padding_of_microbatches_changes_no_update(worker, models, mode):
    settings = {"trainer__router_replay": mode, "trainer__tokens_per_microbatch": 60}
    plain = worker(train_once, models / "moe", make_groups(), settings)
    padded = worker(train_once, models / "moe", make_groups(), settings | {"trainer__microbatch_multiple": 64})
    assert_close(padded[1], plain[1], rtol=1e-4, atol=1e-7)
    assert_same_agreement(padded[0].agreement, plain[0].agreement)
    assert padded[0].router_fallback_rows == plain[0].router_fallback_rows == 0


def test_the_update_does_not_depend_on_microbatches(worker, models):
    groups = make_groups()
    one = worker(train_once, models / "moe", groups, {"trainer__router_replay": "R3"})
    many = worker(
        train_once,
        models / "moe",
        groups,
        {"trainer__router_replay": "R3", "trainer__tokens_per_microbatch": 40},
    )
    assert (one[0].microbatches, many[0].microbatches > 3) == (1, True)
    assert_close(many[1], one[1], rtol=1e-4, atol=1e-7)
    for field in ("loss", "ppo_kl_k3", "entropy", "clip_fraction", "effective_sample_size_ratio", "grad_norm"):
        assert getattr(many[0], field) == pytest.approx(getattr(one[0], field), rel=1e-4, abs=1e-6), field


def rank_of_two(path, rank, init_method, groups):
    with Opened(
        path,
        rank=rank,
        init_method=init_method,
        trainer__router_replay="R3",
        trainer__parallel__dp=2,
    ) as (trainer, _):
        report = step(trainer, groups)
        # A rank without groups must still take part.
        second = step(trainer, groups if rank == 0 else [])
        return report, second, parameters(trainer)


def one_rank_two_steps(path, first, second):
    with Opened(path, trainer__router_replay="R3") as (trainer, _):
        return step(trainer, first), step(trainer, second), parameters(trainer)


def test_two_data_parallel_ranks_make_the_update_of_one(worker, models):
    groups = make_groups()
    by_rank = split_over_ranks([group.num_tokens for group in groups], 2)
    shares = [[groups[index] for index in indices] for indices in by_rank]
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        init_method = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(rank_of_two, models / "moe", r, init_method, shares[r]) for r in range(2)]
        expected = worker(one_rank_two_steps, models / "moe", groups, shares[0])
        ranks = [future.result(timeout=TIMEOUT_S) for future in futures]
    for first, second, weights in ranks:
        assert_close(weights, expected[2], rtol=1e-5, atol=1e-6)
        for got, wanted in ((first, expected[0]), (second, expected[1])):
            for field in ("tokens_masked", "groups", "trajectories"):
                assert getattr(got, field) == getattr(wanted, field), field
            for field in ("loss", "grad_norm", "entropy"):
                assert getattr(got, field) == pytest.approx(getattr(wanted, field), rel=1e-4, abs=1e-6), field
            assert list(got.agreement_by_staleness) == list(wanted.agreement_by_staleness)
            assert_same_agreement(got.agreement, wanted.agreement)
            for age, agreement in got.agreement_by_staleness.items():
                assert_same_agreement(agreement, wanted.agreement_by_staleness[age])
    assert (ranks[0][2]["embedding.word_embeddings.weight"] == ranks[1][2]["embedding.word_embeddings.weight"]).all()


def mask_everything_then_poison(path):
    import torch

    groups = make_groups()
    with Opened(path, trainer__router_replay="R3") as (trainer, _):
        before = parameters(trainer)
        masked = step(trainer, groups, oldest_version=5)
        after_masked = parameters(trainer)
        norm = dict(trainer._chunks[0].module.named_parameters())["decoder.final_layernorm.weight"]
        with torch.no_grad():
            kept = norm.clone()
            norm[0] = float("inf")
        poisoned = step(trainer, groups)
        with torch.no_grad():
            norm.copy_(kept)
        after_poison = parameters(trainer)
        healthy = step(trainer, groups)
        return before, masked, after_masked, poisoned, after_poison, healthy, parameters(trainer)


def test_invariant_4_an_all_stale_batch_and_a_non_finite_gradient_are_skipped_and_training_goes_on(worker, models):
    before, masked, after_masked, poisoned, after_poison, healthy, after = worker(
        mask_everything_then_poison, models / "moe"
    )
    responses = sum(len(t.response_ids) for g in make_groups() for t in g.trajectories)
    assert (masked.skipped, masked.agreement.tokens) == ({"no_tokens": 1}, 0)
    assert masked.tokens_masked == {"stale": responses, "not_sampled": 0}
    assert (masked.loss, masked.agreement.kl, masked.agreement_by_staleness) == (0.0, 0.0, {})
    assert poisoned.skipped == {"non_finite": 1}
    assert not np.isfinite(poisoned.grad_norm)
    for name, values in before.items():
        assert (after_masked[name] == values).all()
        assert (after_poison[name] == values).all()
    assert healthy.skipped == {}
    assert np.isfinite(healthy.grad_norm)
    assert any((after[name] != values).any() for name, values in before.items())


def change_stale_tokens(path):
    """Gradients of a batch, and of the same batch with other behaviour log-probs on its stale tokens."""
    results = []
    for shift in (0.0, 3.0):
        groups = [
            replace(
                group,
                trajectories=tuple(
                    replace(t, logprobs=t.logprobs - np.float32(shift) * (t.versions < 4)) for t in group.trajectories
                ),
            )
            for group in make_groups()
        ]
        results.append(train_once(path, groups, {"trainer__router_replay": "R3"}, oldest_version=3)[:2])
    return results


def test_invariant_4_stale_tokens_contribute_no_gradient_and_no_metric(worker, models):
    (report, gradients), (shifted_report, shifted) = worker(change_stale_tokens, models / "moe")
    assert report.tokens_masked["stale"] > 0
    assert set(report.agreement_by_staleness) == {0}
    assert_close(shifted, gradients, rtol=0, atol=0)
    assert replace(shifted_report, seconds={}) == replace(report, seconds={})


def supervised(path):
    ids = sequences()
    batch = [(x, np.arange(len(x)) >= 3) for x in ids]
    with Opened(path, trainer__optimizer__warmup_steps=2) as (trainer, _):
        logprobs = trainer.logprobs(ids)
        losses = [trainer.supervised_step(batch) for _ in range(8)]
    return losses, -np.concatenate([x[2:] for x in logprobs]).mean()


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_supervised_steps_report_the_cross_entropy_of_the_masked_tokens_and_learn(worker, models, name):
    losses, expected = worker(supervised, models / name)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]


# ---- the device seam ----


def norms():
    """(ours, torch's): output, gradients of input and weight, and whether bfloat16 stays bfloat16."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from async_rl.trainer.norm import RMSNorm

    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    results = []
    x, upstream, weight = torch.randn(7, 1, 3, 16), torch.randn(7, 1, 3, 16), torch.rand(16)
    for norm in (RMSNorm(config=config, hidden_size=16, eps=1e-3), torch.nn.RMSNorm(16, 1e-3)):
        norm.weight.data.copy_(weight)
        leaf = x.clone().requires_grad_()
        output = norm(leaf)
        output.backward(upstream)
        results.append([t.detach().numpy() for t in (output, leaf.grad, norm.weight.grad)])
    half = RMSNorm(config=config, hidden_size=16).bfloat16()(x.bfloat16())
    return *results, half.dtype is torch.bfloat16


def test_rms_norm_and_its_gradients_are_those_of_torch(worker):
    ours, expected, keeps_dtype = worker(norms)
    for got, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert keeps_dtype


def what_megatron_lacks():
    import inspect

    import torch
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def fails(call):
        try:
            call()
        except (RuntimeError, AssertionError):
            return True
        return False

    return {
        "current_device": fails(torch.cuda.current_device),
        "te_general_gemm": not hasattr(moe_utils, "te_general_gemm"),
        "recompute_rng": fails(random._get_cuda_rng_state),
        "device_in_words": fails(lambda: torch.zeros([], device="cuda")),
        "rng_tracker": fails(lambda: random.get_cuda_rng_tracker().add("some", 0)),
        "transformer_engine_stand_ins": multi_latent_attention.HAVE_TE,
        "dispatcher_stream": "torch.cuda.Stream()" in inspect.getsource(MoEAlltoAllTokenDispatcher.__init__),
        "pipeline_shapes": "batch_isend_irecv" in inspect.getsource(P2PCommunicator._communicate_shapes),
        # What trainer/megatron.py and trainer/attention.py mend.
        "experts_as_dense": "config.expert_model_parallel_size > 1" in inspect.getsource(layers.ColumnParallelLinear),
        "rotary_key_gradient": "gather_from_tensor_model_parallel_region(kv_combined)"
        in inspect.getsource(multi_latent_attention.MLASelfAttention),
    }


def test_every_patch_of_the_device_seam_is_still_needed():
    """Fails once torch or Megatron do without one: then remove it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        lacking = pool.submit(what_megatron_lacks).result(timeout=TIMEOUT_S)
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU: nothing is lacking, and nothing is patched")
    assert lacking == dict.fromkeys(lacking, True)
