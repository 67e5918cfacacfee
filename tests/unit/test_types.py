"""What a Trajectory refuses: segments, stamps, log-probs and routing that do not fit one another."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from async_rl.errors import InvalidTrajectory
from async_rl.types import NOT_SAMPLED, RoutingSpec, Segment, Trajectory

SPEC = RoutingSpec(num_moe_layers=2, top_k=1, num_experts=4)


def rows(count):
    return np.ones((count, 2, 1), np.uint8)


def trajectory():
    """Two tokens of version 3, two of 4, one that nobody sampled, one of 4; the first segment with its own routing."""
    return Trajectory(
        trajectory_id="t",
        prompt_ids=np.array([7, 8, 9], np.int32),
        response_ids=np.arange(6, dtype=np.int32),
        logprobs=np.array([-1, -1, -1, -1, np.nan, -1], np.float32),
        versions=np.array([3, 3, 4, 4, NOT_SAMPLED, 4], np.int32),
        segments=(Segment(0, 2, 3, rows(4)), Segment(2, 4, 4), Segment(5, 6, 4)),
        finish_reason="stop",
        routed_experts=rows(8),
        routing_spec=SPEC,
    )


def test_what_is_sampled_and_where_it_was_resumed():
    subject = trajectory()
    assert subject.sampled.tolist() == [True] * 4 + [False, True]
    assert subject.resume_points == (2,)
    assert subject.is_partial
    assert subject.oldest_version == 3


def changed(name, index, value):
    array = getattr(trajectory(), name).copy()
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed("logprobs", 1, np.nan), r"logprobs\[1\] is nan"),
        (changed("logprobs", 1, np.inf), r"logprobs\[1\] is inf"),
        (changed("logprobs", 4, -1.0), r"logprobs\[4\] is -1.0"),
        (changed("versions", 4, 4), r"logprobs\[4\] is nan"),
        (changed("versions", 4, 4) | changed("logprobs", 4, -1.0), r"versions\[4\] is 4, but its segment has -1"),
        (changed("versions", 1, 4), r"versions\[1\] is 4, but its segment has 3"),
        (changed("versions", 5, NOT_SAMPLED), r"logprobs\[5\] is -1.0"),
        ({"segments": ()}, r"segments cover \[\]"),
        ({"segments": (Segment(0, 2, 3), Segment(2, 4, 4))}, r"cover \[0, 4\], the response \[0, 6\]"),
        ({"segments": (Segment(0, 2, 3), Segment(1, 4, 4), Segment(5, 6, 4))}, "does not follow token 2"),
        ({"segments": (Segment(0, 2, 3), Segment(2, 2, 4), Segment(2, 6, 4))}, "does not follow token 2"),
        ({"segments": (Segment(0, 2, 3), Segment(2, 4, -1), Segment(5, 6, 4))}, "has version -1"),
        ({"routed_experts": rows(9)}, r"shape \(9, 2, 1\), expected \(8, 2, 1\)"),
        (
            {"routed_experts": None, "routing_spec": None},
            r"segment \[0, 2\) has routed_experts, but the trajectory has none",
        ),
        (
            {"segments": (Segment(0, 2, 3, rows(5)), Segment(2, 4, 4), Segment(5, 6, 4))},
            r"segment \[0, 2\): routed_experts has shape \(5, 2, 1\), expected \(4, 2, 1\)",
        ),
        (
            {"segments": (Segment(0, 2, 3, rows(4) * 4), Segment(2, 4, 4), Segment(5, 6, 4))},
            r"routed_experts\[0, 0, 0\] is 4, the model has 4 experts",
        ),
    ],
)
def test_invariant_1_what_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(InvalidTrajectory, match=f"trajectory t: .*{message}"):
        replace(trajectory(), **changes)


def test_a_trajectory_can_be_sent_to_another_process():
    sent = pickle.loads(pickle.dumps(trajectory()))
    assert sent.trajectory_id == trajectory().trajectory_id
    assert sent.segments[0].routed_experts.tolist() == trajectory().segments[0].routed_experts.tolist()
