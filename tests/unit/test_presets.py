"""The presets: settings to lay over a run's own, each with the numbers of its paper."""

import re
from pathlib import Path

import pytest
import yaml

from async_rl.config.loading import load

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {path.stem: path for path in sorted((ROOT / "configs" / "presets").glob("*.yaml"))}
RECIPE = ROOT / "configs" / "tiny_moe.yaml"
PAGE = ROOT / "docs" / "how-to" / "choose-a-loss.md"

# What each changes of a run without a loss of its own.
CHANGES = {
    "cispo": {"policy": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "dapo": {"clip_high": 0.28},
    "decoupled_ppo": {"proximal": "recompute", "importance.level": "token", "importance.mode": "plain"},
    "dppo": {"policy": "dppo", "divergence_bound": 0.15, "normalize_by_std": False, "aggregation": "fixed_length"},
    "dr_grpo": {"normalize_by_std": False, "aggregation": "fixed_length"},
    "grpo": {"aggregation": "sequence_mean", "kl": "k3", "kl_coef": 0.04},
    "gspo": {
        "policy": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "proximal": "recompute",
        "aggregation": "sequence_mean",
    },
    "icepop": {
        "proximal": "recompute",
        "importance.level": "token",
        "importance.mode": "mask",
        "importance.high": 5.0,
        "aggregation": "sequence_mean",
    },
    "ipo": {"policy": "ipo", "divergence_bound": 0.3, "normalize_by_std": False},
    "m2po": {
        "proximal": "recompute",
        "importance.level": "token",
        "importance.mode": "plain",
        "rejection.rule": "second_moment",
        "rejection.bound": 0.04,
    },
    "rloo": {
        "policy": "reinforce",
        "advantage": "rloo",
        "importance.level": "token",
        "aggregation": "sequence_sum",
        "kl": "k2",
        "kl_coef": 0.03,
    },
}


def flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def changed(names):
    """Return the settings that differ from the recipe's with these presets laid over it."""
    before = flat(load(RECIPE).model_dump(mode="json"))
    after = flat(load([RECIPE, *(PRESETS[name] for name in names)]).model_dump(mode="json"))
    return {key: value for key, value in after.items() if before[key] != value}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_the_loss_as_its_paper_says_and_little_else(name):
    found = changed([name])
    further = {
        "dapo": {"rollout.filter.zero_variance": True},  # dynamic sampling
        "gspo": {"async_training.require_batches": 4},
    }.get(name, {})
    assert found == {f"trainer.loss.{key}": value for key, value in CHANGES[name].items()} | further


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_short_and_names_its_source(name):
    text = PRESETS[name].read_text()
    comment = "".join(line for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"arXiv:\d{4}\.\d{5}|pull requests \d+", comment)
    assert len(yaml.safe_dump(yaml.safe_load(text)).splitlines()) < 20


def test_two_presets_are_one_after_the_other():
    assert changed(["grpo", "ipo"]).items() >= {"trainer.loss.policy": "ipo", "trainer.loss.kl_coef": 0.04}.items()


def test_the_page_on_presets_has_all_of_them_and_no_other():
    named = set(re.findall(r"^\| `configs/presets/(\w+)\.yaml`", PAGE.read_text(), re.M))
    assert named == set(PRESETS) == set(CHANGES)
