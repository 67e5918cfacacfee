"""Gradients that are reduced while the backward pass still runs are those that are reduced after it."""

import numpy as np
import pytest

from tests.support.layouts import TOLERANCE, config_of, make_groups, relative, shared_out

pytestmark = pytest.mark.megatron

OVERLAPPED = {"overlap_grad_reduce": True, "bucket_size": 2000}


def train(trainer, batches):
    """Make three streamed steps, the second of which has no token young enough; and a gradient of early schedules."""
    from async_rl.trainer.objective import cross_entropy
    from async_rl.trainer.packing import Packer
    from async_rl.trainer.samples import plain_sample

    began = []
    for chunk in trainer._chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            start = group.start_grad_sync

            def counted(*arguments, start=start, **named):
                began.append(trainer._executing)
                return start(*arguments, **named)

            group.start_grad_sync = counted
    run = trainer._executor._run

    def running(*arguments, **named):
        trainer._executing = True
        try:
            return run(*arguments, **named)
        finally:
            trainer._executing = False

    trainer._executor._run, trainer._executing = running, False
    norms = []
    for number, shares in enumerate(batches):
        groups = shares[trainer._place.dp]
        oldest = 5 if number == 1 else 3
        trainer.begin_step(version=5, oldest_version=oldest)
        for part in np.array_split(np.arange(len(groups)), 3):
            trainer.accumulate([groups[index] for index in part])
        norms.append(trainer.finish_step().grad_norm)
    weights = {name: None if w is None else w.detach().numpy().copy() for name, w in trainer.weights()}

    # As where the last call of a step has nothing left to compute.
    executor, packer = trainer._executor, Packer.of(trainer._config.trainer, None)
    executor.zero_gradients()
    ids = np.arange(30 + trainer._place.dp, dtype=np.int32)
    samples = [plain_sample(str(n), ids, np.ones(len(ids) - 1, bool)) for n in range(5)]
    batches = packer.add(samples) + packer.flush()
    executor.accumulate(batches, cross_entropy(trainer._groups.vocabulary), filler=packer.filler(), last=False)
    executor.finish_gradients(1.0)
    gradients = [p.main_grad.numpy().copy() for chunk in trainer._chunks for p in chunk.parameters()]
    return norms, weights, gradients, began


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 2},
        pytest.param({"dp": 2, "pp": 2, "vpp": 2}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "ep": 2, "cp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_reduced_early_are_those_reduced_late(ranks, checkpoint, layout):
    batches = [shared_out(make_groups(seed=seed, count=6), layout.get("dp", 1)) for seed in (0, 1, 2)]
    late, early = (
        ranks.run(train, config_of(checkpoint, layout, trainer__tokens_per_microbatch=120, trainer__ddp=given), batches)
        for given in ({}, OVERLAPPED)
    )
    for (norms, weights, gradients, began), (norms_late, weights_late, gradients_late, began_late) in zip(
        early, late, strict=True
    ):
        assert relative(norms, norms_late) < TOLERANCE
        assert norms[1] == 0.0, "the second step trains nothing"
        if weights[next(iter(weights))] is not None:
            assert max(relative(weights[name], weights_late[name]) for name in weights) < TOLERANCE
        for found, expected in zip(gradients, gradients_late, strict=True):
            assert relative(found, expected) < TOLERANCE
        assert any(began), "some began within a schedule"
        assert not any(began_late)
