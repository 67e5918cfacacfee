"""The learning rate of each optimizer step."""

import pytest

from async_rl.config.loading import validate
from async_rl.config.training import OptimizerSection
from async_rl.errors import ConfigError
from async_rl.trainer.megatron.optimizer import learning_rate


def rates(steps, **settings):
    return [learning_rate(OptimizerSection(lr=1.0, **settings), step) for step in steps]


def test_it_rises_in_a_line_and_stays():
    assert rates(range(6), warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates([0, 1000]) == [1.0, 1.0]


def test_it_falls_in_a_line_or_along_a_cosine_to_its_least_and_stays_there():
    linear = {"warmup_steps": 2, "schedule": "linear", "decay_steps": 12, "min_lr": 0.5}
    assert rates([1, 2, 7, 12, 99], **linear) == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
    cosine = linear | {"schedule": "cosine"}
    assert rates([1, 2, 7, 12, 99], **cosine) == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
    assert rates([4], **cosine) > rates([4], **linear), "a cosine starts slowly"


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"schedule": "cosine"}, "decay_steps is None; set it above warmup_steps (0), for example .* 100"),
        (
            {"schedule": "linear", "warmup_steps": 5, "decay_steps": 5},
            "decay_steps is 5; set it above warmup_steps (5)",
        ),
        ({"decay_steps": 5}, "schedule is constant"),
        ({"schedule": "linear", "decay_steps": 5, "lr": 1e-6, "min_lr": 1e-5}, "min_lr .* is above lr"),
    ],
)
def test_a_schedule_that_would_not_do_what_it_is_told_is_refused(optimizer, words):
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "trainer": {"optimizer": optimizer}}
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace(")", r"\)")):
        validate(tree)
