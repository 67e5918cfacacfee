"""The cost of encoding and decoding a group, against copying the same bytes.

One trajectory of 2,048 tokens (512 prompt, 1,536 response) of a 48-layer MoE with top-8 of 128 experts. The
groups are different ones in turn, together more than a cache holds, as they would come from an engine. Encoding
and copying alternate; each figure is a median. The last line of stdout is one JSON object:

    size_ratio            encoded bytes over the sum of the arrays
    encode_over_memcpy    time of encode over that of copying the encoded bytes into new memory
    encode_us, memcpy_us  those times
    decode_us             time of decode, checksum and validation included
    group8_*              the same for a group of eight such trajectories, the size that really travels
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from async_rl.queue.codec import decode, encode
from async_rl.types import Group, Prompt, RoutingSpec, Segment, Trajectory
from tests.support.groups import grouped

PROMPT, RESPONSE, SPEC = 512, 1536, RoutingSpec(num_moe_layers=48, top_k=8, num_experts=128)


def make_group(rng: np.random.Generator, trajectories: int) -> Group:
    prompt_ids = rng.integers(0, 150_000, PROMPT).astype(np.int32)
    shape = (PROMPT + RESPONSE - 1, SPEC.num_moe_layers, SPEC.top_k)
    return grouped(
        "0-1.0",
        Prompt("0-1", 1, "a prompt", prompt_ids, {"answer": "42"}),
        [
            Trajectory(
                trajectory_id=f"0-1.0/{i}",
                prompt_ids=prompt_ids,
                response_ids=rng.integers(0, 150_000, RESPONSE).astype(np.int32),
                logprobs=rng.normal(size=RESPONSE).astype(np.float32),
                versions=np.repeat(np.array([3, 4], dtype=np.int32), [1000, RESPONSE - 1000]),
                segments=(Segment(0, 1000, 3), Segment(1000, RESPONSE, 4)),
                finish_reason="stop",
                routed_experts=rng.integers(0, SPEC.num_experts, shape, dtype=np.uint8),
                routing_spec=SPEC,
            )
            for i in range(trajectories)
        ],
    )


def array_bytes(group: Group) -> int:
    """Return the bytes that have to travel: the arrays of the trajectories, and the prompt's ids once more."""
    arrays = [group.prompt.token_ids]
    for t in group.trajectories:
        arrays += [t.prompt_ids, t.response_ids, t.logprobs, t.versions]
        if t.routed_experts is not None:
            arrays.append(t.routed_experts)
    return sum(array.nbytes for array in arrays)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(trajectories: int, groups: int, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    sources = [make_group(rng, trajectories) for _ in range(groups)]
    messages = [encode(group) for group in sources]
    encoding, copying, decoding = [], [], []
    for i in range(rounds * groups):
        group, message = sources[i % groups], messages[i % groups]
        encoding.append(seconds(lambda group=group: encode(group)))
        copying.append(seconds(lambda message=message: message.copy()))
        decoding.append(seconds(lambda message=message: decode(message)))
    encode_s, memcpy_s = statistics.median(encoding), statistics.median(copying)
    return {
        "size_ratio": round(len(messages[0]) / array_bytes(sources[0]), 5),
        "encode_over_memcpy": round(encode_s / memcpy_s, 3),
        "decode_us": round(statistics.median(decoding) * 1e6, 1),
        "encode_us": round(encode_s * 1e6, 1),
        "memcpy_us": round(memcpy_s * 1e6, 1),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result = measure(trajectories=1, groups=64, rounds=20)
    result |= {f"group8_{key}": value for key, value in measure(trajectories=8, groups=12, rounds=10).items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
