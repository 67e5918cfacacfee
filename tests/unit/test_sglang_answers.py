"""What is sent to SGLang's server and what its answers mean, without a server."""

import base64

import numpy as np
import pytest

from async_rl.errors import EngineError, InvalidTrajectory
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.interface import EngineLoad, Sampling
from async_rl.rollout.engine.sglang import answers
from async_rl.rollout.engine.sglang.answers import Answer
from async_rl.rollout.partial import PartialRollout

MODEL = ModelConfig(
    architecture="Glm4MoeForCausalLM",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    moe_layers=(1, 2),
    num_experts=8,
    top_k=2,
)
PROMPT = np.arange(3, 8, dtype=np.int32)


def encoded(rows):
    """Routed experts as the server sends them: int32, a column for each layer, base64."""
    return base64.b64encode(np.ascontiguousarray(rows, dtype=np.int32).tobytes()).decode()


def rows(count, start=0):
    """Rows [count, 3, 2] that tell their number; the dense layer has zeros."""
    made = np.zeros((count, 3, 2), dtype=np.int32)
    numbers = np.arange(start, start + count)
    made[:, 1:, 0], made[:, 1:, 1] = (numbers % 7)[:, None], 7
    return made


def part(tokens, end=None, **meta):
    logprobs = [[-0.5 - token, token, None] for token in tokens]
    return {"output_ids": tokens, "meta_info": {"output_token_logprobs": logprobs, "finish_reason": end, **meta}}


def answered(*parts):
    answer = Answer()
    for each in parts:
        answer.add(each)
    return answer


def versions(*spans):
    return [{"version": str(version), "start": start, "end": end} for version, start, end in spans]


UNNAMED = [{"version": "default", "start": 0, "end": 1}]


def test_a_streamed_answer_is_one_output_with_the_version_of_each_token():
    answer = answered(
        part([9]),
        part([10, 11]),
        part(
            [1],
            {"type": "stop", "matched": 1},
            weight_versions=versions((6, 0, 2), (7, 2, 4)),
            routed_experts=encoded(rows(6, 2)),
            cached_tokens=3,
        ),
    )
    output = answer.output(len(PROMPT), 2, MODEL)
    assert (output.token_ids.tolist(), output.cached_tokens) == ([9, 10, 11, 1], 3)
    assert output.logprobs.tolist() == [-9.5, -10.5, -11.5, -1.5]
    assert output.versions.tolist() == [6, 6, 7, 7]
    assert output.finish_reason == "stop"
    assert (output.routed_experts.shape, output.routed_experts.dtype) == ((6, 2, 2), np.uint8)
    np.testing.assert_array_equal(output.routed_experts, rows(6, 2)[:, 1:])
    assert answer.first_version == "6"


def test_an_answer_without_a_token_has_no_experts():
    output = answered(part([], {"type": "abort", "message": "Abort"}, weight_versions=versions((0, 0, 0)))).output(
        5, 0, MODEL
    )
    assert (len(output.token_ids), output.routed_experts, output.finish_reason) == (0, None, "abort")


@pytest.mark.parametrize("again", [4, 6])
def test_the_experts_of_a_resumed_call_that_are_concatenated_are_refused(again):
    """verl's pull request 6029: to the rows of the first call those of the whole sequence were appended."""
    first = PartialRollout.begin("t", PROMPT, max_response_tokens=20, eos_token_id=1, routing_spec=MODEL.routing_spec)
    tokens, _, row = first.next_request()
    cut = part([9, 10], {"type": "abort"}, weight_versions=versions((0, 0, 2)), routed_experts=encoded(rows(6)))
    first = first.absorb(answered(cut).output(len(tokens), row, MODEL))
    tokens, _, row = first.next_request()
    end = {"type": "stop", "matched": 1}
    stamps = versions((1, 0, 2))
    whole = part([11, 1], end, weight_versions=stamps, routed_experts=encoded(rows(8)))
    resumed = first.absorb(answered(whole).output(len(tokens), row, MODEL))
    np.testing.assert_array_equal(resumed.routed_experts, rows(8)[:, 1:])
    both = np.concatenate([rows(again), rows(8)])
    concatenated = part([11, 1], end, weight_versions=stamps, routed_experts=encoded(both))
    with pytest.raises((EngineError, InvalidTrajectory), match=rf"{both.size} routed experts, and \(8, 3, 2\)"):
        first.absorb(answered(concatenated).output(len(tokens), row, MODEL))


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"routed_experts": encoded(rows(5))}, "did not say which version sampled token 0 of 1"),
        ({"weight_versions": versions((3, 1, 1)), "routed_experts": encoded(rows(5))}, "did not say which version"),
        ({"weight_versions": UNNAMED, "routed_experts": encoded(rows(5))}, "expected numbers"),
        ({"weight_versions": versions((3, 0, 1))}, "returned no routed experts"),
        ({"weight_versions": versions((3, 0, 1)), "routed_experts": "AA"}, "cannot be read"),
        ({"weight_versions": versions((3, 0, 1)), "routed_experts": encoded(rows(5) + 8)}, "expert ids from 8 to"),
        ({"weight_versions": versions((3, 0, 1)), "routed_experts": encoded(rows(5) - 1)}, "expert ids from -1 to"),
        ({"weight_versions": versions((3, 0, 1)), "routed_experts": encoded(rows(4))}, "24 routed experts, and"),
    ],
)
def test_an_answer_that_lacks_something_is_refused(meta, said):
    with pytest.raises(EngineError, match=said):
        answered(part([1], {"type": "length", "length": 1}, **meta)).output(5, 0, MODEL)


@pytest.mark.parametrize(
    "odd", [{}, {"output_ids": [1]}, [], {"output_ids": [1], "meta_info": {"finish_reason": None}}]
)
def test_what_is_no_part_of_an_answer_is_refused(odd):
    with pytest.raises(EngineError, match="no part of a response"):
        Answer().add(odd)


def test_tokens_without_log_probs_and_unknown_ends_are_refused():
    short = part([1, 2])
    short["meta_info"]["output_token_logprobs"].pop()
    with pytest.raises(EngineError, match="2 tokens with 1 log-probs"):
        Answer().add(short)
    with pytest.raises(EngineError, match="ended by 'explosion'"):
        answered(part([1], {"type": "explosion"})).output(5, None, MODEL)


async def test_events_are_whole_however_they_arrive_and_however_long_they_are():
    sent = [b'{"a": 1}', b"x" * 10_000_000, b'{"b": "data: "}']
    stream = b"".join(b"data: " + event + b"\n\n" for event in sent) + b"data: [DONE]\n\n"
    for size in (3, 1 << 16, len(stream)):
        stream_of = stream if size > 3 else stream.replace(sent[1], b"y")

        async def chunks(stream_of=stream_of, size=size):
            for start in range(0, len(stream_of), size):
                yield stream_of[start : start + size]

        expected = [event if event in stream_of else b"y" for event in sent]
        assert [event async for event in answers.events(chunks())] == expected


def test_a_score_has_all_tokens_but_the_first():
    entries = [[None, 3, None], [-1.0, 4, None], [-2.0, 5, None]]
    meta = {"input_token_logprobs": entries, "routed_experts": encoded(rows(2))}
    score = answers.scored({"meta_info": meta}, 3, MODEL, routed=True)
    assert score.logprobs.tolist() == [-1.0, -2.0]
    np.testing.assert_array_equal(score.routed_experts, rows(2)[:, 1:])
    with pytest.raises(EngineError, match="scored 2 of 4 tokens"):
        answers.scored({"meta_info": meta}, 5, MODEL, routed=True)
    with pytest.raises(EngineError, match="no score"):
        answers.scored({"error": "x"}, 3, MODEL, routed=True)


def test_what_is_asked_of_the_server():
    sampling = Sampling(0.7, 0.9, top_k=20)
    body = answers.generate("r#1", PROMPT, sampling, 12, stop_token_ids=[1, 2], cache_key="v3", first_row=4)
    assert body["input_ids"] == PROMPT.tolist()
    assert (body["return_routed_experts"], body["routed_experts_start_len"], body["extra_key"]) == (True, 4, "v3")
    how = body["sampling_params"]
    assert (how["temperature"], how["top_p"], how["top_k"], how["max_new_tokens"]) == (0.7, 0.9, 20, 12)
    assert how["stop_token_ids"] == [1, 2]
    greedy = Sampling(0.7, 0.9, top_k=20, greedy=True)
    body = answers.generate("r#2", PROMPT, greedy, 1, stop_token_ids=[], cache_key="v3", first_row=None)
    assert "return_routed_experts" not in body
    assert [body["sampling_params"][name] for name in ("temperature", "top_p", "top_k")] == [0.0, 1.0, -1]


def test_what_the_server_has_to_do():
    parts = [
        {"num_waiting_reqs": 2, "token_usage": 0.25, "max_total_num_tokens": 1000, "num_running_reqs": 4},
        {"num_waiting_reqs": 1, "token_usage": 0.5, "max_total_num_tokens": 1000},
    ]
    assert answers.load({"loads": parts}) == EngineLoad(waiting=3, kv_use=0.5, kv_tokens=2000)
    for wrong in ({}, {"loads": [{"num_waiting_reqs": 2}]}, {"loads": [{**parts[0], "token_usage": "much"}]}):
        with pytest.raises(EngineError, match="is no load"):
            answers.load(wrong)
