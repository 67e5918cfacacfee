"""The doctor's estimate of a trainer rank against the tensors of a real one, which are the same in every run."""

import pytest

from tests.support.trainer_memory import SIZES, allocated, estimated, make_model, settings

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("demo", "float32"),
        ("vocabulary", "float32"),
        ("demo", "bfloat16"),
    ],
)
def test_the_doctor_knows_what_a_trainer_rank_takes(ranks, tmp_path, name, dtype):
    size = SIZES[name]
    ranks.call(make_model, tmp_path, size)  # in float32, whatever the run trains in
    config = settings(tmp_path, size, dtype)
    expected = estimated(config)
    peak, between_steps = ranks.call(allocated, config)
    assert between_steps == pytest.approx(expected.fixed, rel=0.03)
    assert peak == pytest.approx(expected.total, rel=0.15)
