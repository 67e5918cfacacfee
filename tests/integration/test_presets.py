"""Each preset trains: two updates of a real trainer, on tokens whose log-probs differ a little from its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.groups import with_trajectories
from tests.support.one_rank import Opened, make_groups, parameters, step

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

PRESETS = {path.stem: path for path in (Path(__file__).resolve().parents[2] / "configs" / "presets").glob("*.yaml")}


def overrides_of(path: Path) -> dict[str, object]:
    """Return a preset's settings by section__key."""

    def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in tree.items():
            found |= flat(value, f"{prefix}{key}__") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    return flat(yaml.safe_load(path.read_text()))


def nearly_on_policy(trainer, groups):
    """Return the groups with behaviour log-probs near those of the trainer, one in ten of them far enough to reject."""
    rng = np.random.default_rng(0)

    def moved(trajectory):
        ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids])
        own = trainer.logprobs([ids])[0][len(trajectory.prompt_ids) - 1 :]
        noise = rng.normal(0, 0.02, len(own)) * np.where(rng.random(len(own)) < 0.1, 60, 1)
        return replace(trajectory, logprobs=np.minimum(own + noise, 0).astype(np.float32))

    return [with_trajectories(group, moved) for group in groups]


def train_twice(path, overrides):
    """Make two updates of one training step; return their reports, and by how much parameters have moved."""
    with Opened(path, **overrides) as (trainer, _):
        before = parameters(trainer)
        batches = [nearly_on_policy(trainer, make_groups(routing=False, seed=seed, epoch=seed)) for seed in (0, 1)]
        trainer.prepare([group for batch in batches for group in batch], oldest_version=2)
        reports = [step(trainer, batch) for batch in batches]
        after = parameters(trainer)
        return reports, max(np.abs(after[name] - before[name]).max() for name in before)


@pytest.mark.parametrize("name", PRESETS)
def test_two_updates(ranks, models, name):
    reports, moved = ranks.call(train_twice, models / "moe", overrides_of(PRESETS[name]))
    assert moved > 0
    for report in reports:
        assert not report.skipped
        assert np.isfinite([report.loss, report.grad_norm]).all()
        assert report.grad_norm > 0
    if name in ("m2po", "icepop"):
        rejected = sum(report.tokens_masked.get("rejected", 0) for report in reports)
        assert 0 < rejected < sum(report.agreement.tokens for report in reports)
