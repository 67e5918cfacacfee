"""What ``tests.bench.cluster`` makes of what it saw, and the weights that it moves; no hosts, no Ray."""

import pytest

from async_rl.weights.shm_file import TensorMeta
from tests.bench import cluster
from tests.support.plain_weights import PlainWeights

MB = 2**20


def measured(seconds, **more):
    return {"seconds": seconds, "publish_s": 0.1, "sent": 2 * MB, "most": 3 * MB, "cores_busy": 1.0, **more}


def test_times_are_given_over_what_the_link_alone_would_take():
    found = [
        ("1 MB to 2 at 8 Mbit/s", measured(1.5, nbytes=MB, mbit=8.0)),
        ("1 MB to 2 without a limit", measured(0.5, nbytes=MB, mbit=0.0)),
    ]
    result = cluster.weights_result(iter(found))
    assert result["weights"] == {"1 MB to 2 at 8 Mbit/s": pytest.approx(1.5e6 / MB)}
    assert result["weights_sent"] == {"1 MB to 2 at 8 Mbit/s": 2.0}
    assert result["link_bytes_most"] == {"1 MB to 2 at 8 Mbit/s": 3.0}
    assert result["local_gbit"] == pytest.approx(MB * 8 / 0.5 / 1e9)


def test_what_a_run_moves_at_its_start_is_not_counted_to_what_it_trains():
    fewer, more = {"to_trainer": 1000.0 + 2 * 50}, {"to_trainer": 1000.0 + 8 * 50}
    assert cluster.per_trained_byte(fewer, more, trained=6 * 40) == {"to_trainer": 1.25}


def test_plain_weights_have_their_size_and_other_values_each_round():
    weights = PlainWeights(3 * MB)
    assert sum(tensor.nbytes for _, tensor in weights) == 3 * MB
    assert [TensorMeta(meta.name, "bfloat16", meta.shape) for meta in weights.metadata()] == [
        TensorMeta.of(name, tensor) for name, tensor in weights
    ]
    weights.change()
    first = {name: tensor.clone() for name, tensor in weights}
    weights.change()
    assert not any(tensor.equal(first[name]) for name, tensor in weights)
