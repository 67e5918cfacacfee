"""What a run's settings and its model add up to at worst: bytes of payloads, responses in flight, tokens of a sync.

Pure arithmetic on settings and config.json. ``capacity`` compares the results with what there is, and says what will
happen.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.config.schema import RunConfig
from async_rl.models.config import ModelConfig
from async_rl.queue.staleness import window_limit

# int32 id, float32 log-prob and int32 version of a response token; int32 id of a prompt's (``queue.codec``).
RESPONSE_TOKEN_BYTES, PROMPT_TOKEN_BYTES = 12, 4
# Start, stop and version of a segment, int32 each.
SEGMENT_BYTES = 12
# In addition to the queue's payloads the object store holds the groups in training and the arguments of calls.
OBJECT_STORE_HEADROOM = 256 * 2**20
# Ray refuses less than 75 MB.
OBJECT_STORE_MINIMUM = 80 * 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """The worst case of a run, with every prompt and response as long as the settings allow."""

    routing_bytes: int
    """Routed experts of one token; 0 where none are returned."""
    response_bytes: int
    group_bytes: int
    step_bytes: int
    """Bytes of the groups that one training step consumes."""
    window_groups: int
    """Groups that may be outstanding: what the staleness budget admits."""
    window_bytes: int
    """Bytes of all of them, when finished."""
    outstanding_responses: int
    """Responses of the groups that may be outstanding."""
    places: int
    """Sequences that all engines together decode at once, with rollout.replicas.max of them."""
    running_responses: int
    """Responses that can be in the engines at one moment."""
    resumed_tokens: int
    """Tokens that the engines prefill again after one weight sync, with every response half done."""
    window_tokens: int
    """Tokens that are generated between two weight syncs."""
    in_flight_bytes: int
    """Bytes of the groups in flight of one replica."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one response token."""
        return self.routing_bytes + RESPONSE_TOKEN_BYTES

    @property
    def used_places(self) -> float:
        """The share of the engines' places that the staleness budget lets responses take."""
        return self.running_responses / self.places

    @property
    def resumed_share(self) -> float:
        """Tokens prefilled again at a weight sync, per token generated between two."""
        return self.resumed_tokens / self.window_tokens


def worst_case(config: RunConfig, model: ModelConfig) -> Sizes:
    """Return the worst case of these settings with this model."""
    rollout, training = config.rollout, config.async_training
    prompt, response = config.data.max_prompt_tokens, rollout.max_response_tokens
    routing_bytes = _routing_bytes(config, model)
    rows, segments = _routing_rows(config)
    response_bytes = (
        rows * routing_bytes + prompt * PROMPT_TOKEN_BYTES + response * RESPONSE_TOKEN_BYTES + segments * SEGMENT_BYTES
    )
    group_bytes = rollout.n * response_bytes + prompt * PROMPT_TOKEN_BYTES  # the prompt, and once more per response
    window_groups = window_limit(
        config.required_groups, training.staleness_threshold, training.trigger_parameter_sync_step
    )
    outstanding = window_groups * rollout.n
    places = rollout.replica_range.max * rollout.max_num_seqs
    running = min(places, outstanding)
    return Sizes(
        routing_bytes=routing_bytes,
        response_bytes=response_bytes,
        group_bytes=group_bytes,
        step_bytes=config.required_groups * group_bytes,
        window_groups=window_groups,
        window_bytes=window_groups * group_bytes,
        outstanding_responses=outstanding,
        places=places,
        running_responses=running,
        resumed_tokens=running * (prompt + response // 2),
        window_tokens=config.required_groups * training.trigger_parameter_sync_step * rollout.n * response,
        in_flight_bytes=_groups_in_flight(config, window_groups) * group_bytes,
    )


def object_store_bytes(max_bytes: int, free_shm: int) -> int:
    """Return the size of the object store that a run starts for queue.max_bytes, with so much free in /dev/shm.

    Above 90 % of that, Ray would put its store into files on a disk, which is slow.
    """
    return max(OBJECT_STORE_MINIMUM, min(max_bytes + OBJECT_STORE_HEADROOM, int(free_shm * 0.9)))


def _routing_bytes(config: RunConfig, model: ModelConfig) -> int:
    spec = model.routing_spec
    if spec is None or not config.rollout.return_routed_experts:
        return 0
    return spec.num_moe_layers * spec.top_k * spec.dtype.itemsize


def _routing_rows(config: RunConfig) -> tuple[int, int]:
    """Return (rows of routed experts, segments) of the longest response.

    With the routing policy ``exact`` each segment keeps rows for all that precedes it too. A response whose first token
    still counts has been interrupted at most async_training.max_staleness times; at even distances, its earlier
    segments keep rows for half of it on average.
    """
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    rows = prompt + response - 1  # the last token never went through a forward pass
    interruptions = config.async_training.max_staleness
    if config.async_training.partial_rollout.routing == "exact":
        rows += interruptions * (prompt + response // 2)
    return rows, interruptions + 1


def _groups_in_flight(config: RunConfig, window_groups: int) -> int:
    """Return the groups that one replica can have in flight: twice what fills it (``rollout.worker``)."""
    filling = -(-config.rollout.trajectory_limit // config.rollout.n)
    return min(2 * filling, window_groups)
