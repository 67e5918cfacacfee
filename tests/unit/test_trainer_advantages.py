"""Advantages reach the tokens of their own responses, in groups of any size. Without Megatron."""

from types import SimpleNamespace

import numpy as np
import pytest

from async_rl.config.schema import LossSection
from async_rl.trainer.advantages import group_advantages, load_advantages
from async_rl.trainer.samples import samples_of
from async_rl.trainer.trainer import Trainer
from async_rl.types import Group, Prompt, Segment, Trajectory


def trajectory(name, reward, tokens, cut):
    stops = (cut, tokens) if cut else (tokens,)
    starts = (0, *stops[:-1])
    return Trajectory(
        trajectory_id=name,
        prompt_ids=np.array([1, 2], np.int32),
        response_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.full(tokens, -1.0, np.float32),
        versions=np.repeat(np.arange(len(stops)), np.diff([0, *stops])).astype(np.int32),
        segments=tuple(Segment(a, b, version) for version, (a, b) in enumerate(zip(starts, stops, strict=True))),
        reward=reward,
        finish_reason="stop",
    )


def groups(sizes):
    """Groups of these sizes, as time limits and failed responses leave them; every other response was resumed."""
    rng = np.random.default_rng(0)
    made = []
    for number, size in enumerate(sizes):
        group_id = f"0-{number}.0"
        prompt = Prompt(f"0-{number}", number + 1, "", np.array([1, 2], np.int32))
        responses = tuple(
            trajectory(f"{group_id}/{index}", float(rng.random()), 4 + index, 2 * (index % 2)) for index in range(size)
        )
        made.append(Group(group_id, prompt, responses))
    return made


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
@pytest.mark.parametrize("per_segment", [False, True])
def test_each_response_is_compared_with_its_own_group_whatever_the_sizes(advantage, per_segment):
    loss = LossSection(advantage=advantage)
    trainer = Trainer.__new__(Trainer)
    trainer._config = SimpleNamespace(
        trainer=SimpleNamespace(loss=loss), rollout=SimpleNamespace(max_response_tokens=100)
    )
    trainer._estimator = load_advantages(loss)
    batch = groups((2, 5, 3))
    trainer._prepared = {
        group.group_id: [
            sample for t in group.trajectories for sample in samples_of(t, oldest_version=0, per_segment=per_segment)
        ]
        for group in batch
    }
    expected = {
        t.trajectory_id: float(value)
        for group in batch
        for t, value in zip(
            group.trajectories, group_advantages(group.group_id, group.rewards, trainer._estimator), strict=True
        )
    }
    found = trainer._with_advantages(batch)
    assert {sample.trajectory_id for sample in found} == set(expected)
    for sample in found:
        assert sample.advantages.tolist() == pytest.approx([expected[sample.trajectory_id]] * sample.positions)
