"""Checks of a run's worst case (``sizes``) against queue, object store, the engines' places, time limits and the disk.

None of them fails a run: responses may stay shorter than allowed. Each says what happens if they do not, and which
setting changes that.
"""

from __future__ import annotations

from collections.abc import Iterator

from async_rl.config.schema import RunConfig
from async_rl.doctor import estimate, machine
from async_rl.doctor.check import Check
from async_rl.doctor.sizes import Sizes, object_store_bytes, worst_case
from async_rl.errors import ModelError
from async_rl.models.config import ModelConfig, read_model_config
from async_rl.queue.wire import MAX_MESSAGE_BYTES

# Bytes per second at which a replica encodes its groups in flight: one copy and a checksum, on one core.
SNAPSHOT_BYTES_PER_S = 10**9
# Below this share, more than half of the engines' capacity is idle whatever happens.
WANTED_PLACES = 0.5
_SHORTER = "rollout.max_response_tokens, rollout.n or trainer.groups_per_step"


def longest_responses(config: RunConfig) -> Iterator[Check]:
    """Say what the longest responses that the settings allow add up to, and what happens then."""
    try:
        model = read_model_config(config.model.path)
    except ModelError:
        return  # ``inputs.model`` reports it, or prepare makes the model
    sizes = worst_case(config, model)
    yield Check(
        "payloads",
        "ok",
        f"at most {sizes.token_bytes} B per token ({sizes.routing_bytes} B of routed experts), "
        f"{readable(sizes.response_bytes)} per response, {readable(sizes.group_bytes)} per group, "
        f"{readable(sizes.step_bytes)} per training step",
    )
    yield _queue(config, sizes)
    yield from _object_store(config, sizes)
    yield from _messages(sizes)
    yield _places(config, sizes)
    yield _weight_sync(config, model, sizes)
    yield from _snapshot(config, sizes)


def checkpoints(config: RunConfig) -> Iterator[Check]:
    """Check that the disk of the runs has room for the checkpoints that are kept, one being written, and the export."""
    try:
        model = read_model_config(config.model.path)
        parameters = estimate.count_parameters(config.model.path, model).total
    except (ModelError, ValueError, OSError):
        return
    itemsize = estimate.BYTES[config.model.dtype]
    export = parameters * itemsize
    each = export + parameters * (estimate.MOMENT_BYTES + (estimate.MASTER_BYTES if itemsize < 4 else 0))
    kept = config.checkpoint.keep + (config.checkpoint.keep_best is not None)
    count = kept + 1 if config.checkpoint.periodic else 0
    needed = export + count * each
    existing = next(path for path in (config.runs.absolute(), *config.runs.absolute().parents) if path.exists())
    free = machine.free_bytes(str(existing))
    detail = (
        f"{readable(free)} free for {config.runs}; the exported model takes {readable(export)}"
        f"{f' and {count} checkpoints {readable(count * each)}' * bool(count)}"
    )
    if needed <= free:
        yield Check("disk", "ok", detail)
    else:
        yield Check(
            "disk",
            "warn",
            f"{detail}: the run ends when there is no room for the next",
            "make room there, set runs to a folder on a larger disk, or lower checkpoint.keep",
        )


def readable(amount: int) -> str:
    """Return an amount of bytes with a unit, for example ``13.8 MB``."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if amount >= factor:
            return f"{amount / factor:.1f} {unit}"
    return f"{amount} B"


def _queue(config: RunConfig, sizes: Sizes) -> Check:
    bound = config.queue.max_bytes
    if sizes.step_bytes > bound:
        return Check(
            "queue.max_bytes",
            "warn",
            f"{readable(bound)}, but the groups of one training step take up to {readable(sizes.step_bytes)}: the "
            "queue then warns and holds one step's groups all the same, and workers wait for the step after it",
            f"set queue.max_bytes to {sizes.step_bytes} or more if there is the memory, or lower {_SHORTER}",
        )
    return Check(
        "queue.max_bytes",
        "ok",
        f"{readable(bound)} holds {bound // sizes.group_bytes} groups; a training step takes "
        f"{config.required_groups}, the staleness budget admits {sizes.window_groups} "
        f"({readable(sizes.window_bytes)})",
    )


def _object_store(config: RunConfig, sizes: Sizes) -> Iterator[Check]:
    if config.queue.backend != "memory" or config.cluster.joined_address:
        return  # the groups are elsewhere, or the store is of a cluster that runs already
    store = object_store_bytes(config.queue.max_bytes, machine.free_bytes("/dev/shm"))
    if sizes.step_bytes <= store:
        yield Check("object store", "ok", f"{readable(store)}, more than the groups of a training step")
        return
    yield Check(
        "object store",
        "warn",
        f"{readable(store)} (queue.max_bytes and what /dev/shm has), but the groups of one training step take up to "
        f"{readable(sizes.step_bytes)}: Ray then writes groups to disk and reads them back for the trainer",
        f"raise queue.max_bytes and /dev/shm (containers: --shm-size), or lower {_SHORTER}",
    )


def _messages(sizes: Sizes) -> Iterator[Check]:
    if sizes.group_bytes > MAX_MESSAGE_BYTES:
        yield Check(
            "messages",
            "warn",
            f"a group takes up to {readable(sizes.group_bytes)}, above the {readable(MAX_MESSAGE_BYTES)} of one "
            "message: such a group is refused, and the run fails",
            "lower rollout.max_response_tokens or rollout.n",
        )


def _places(config: RunConfig, sizes: Sizes) -> Check:
    rollout = config.rollout
    fewest = f", {rollout.replica_range.min * rollout.max_num_seqs} with rollout.replicas.min" * rollout.elastic
    detail = (
        f"{sizes.places} (replicas x max_num_seqs{fewest}); the staleness budget admits {sizes.outstanding_responses} "
        f"responses ({sizes.window_groups} groups of {config.rollout.n}){_in_the_making(config)}"
    )
    if sizes.used_places >= WANTED_PLACES:
        return Check("engine places", "ok", f"{detail}, {sizes.used_places:.0%} of the places are used at most")
    return Check(
        "engine places",
        "warn",
        f"{detail}: at most {sizes.used_places:.0%} of the places are ever used, the rest of the engines idles",
        "raise trainer.groups_per_step or async_training.staleness_threshold, or lower rollout.replicas or "
        "rollout.max_num_seqs",
    )


def _in_the_making(config: RunConfig) -> str:
    """Return what is to be said of the second limit, where rollouts that wait for tools leave their places to others.

    Nothing, where there are as many rollouts as places.
    """
    rollout = config.rollout
    if rollout.trajectory_limit == rollout.max_num_seqs:
        return ""
    bound = rollout.max_kv_use
    kept = (
        ""
        if not rollout.agent_sections or bound is None
        else f", while their contexts take {bound:.0%} of its KV cache at most"
    )
    return f"; each replica has up to {rollout.trajectory_limit} rollouts in the making (max_trajectories){kept}"


def _weight_sync(config: RunConfig, model: ModelConfig, sizes: Sizes) -> Check:
    mode = config.async_training.partial_rollout.mode
    if mode == "in_flight":
        return Check("prefill per sync", "ok", "none: with mode in_flight, generations continue on their KV cache")
    if mode == "drain":
        return Check(
            "prefill per sync",
            "ok",
            "none: with mode drain, each weight sync waits until all generations under way have ended, up to "
            f"{config.rollout.max_response_tokens} tokens later",
        )
    tokens = sizes.resumed_tokens
    if machine.sets_kv_cache(config):  # What does not fit the KV cache is not running.
        tokens_per_engine = config.rollout.kv_cache_bytes // model.kv_token_bytes(config.kv_value_bytes)
        tokens = min(tokens, config.rollout.replica_range.max * tokens_per_engine)
    share = tokens / sizes.window_tokens
    detail = (
        f"up to {tokens:,} tokens (mode resume, {sizes.running_responses} responses half done), "
        f"{share:.2f} per token generated between two weight syncs"
    )
    if share <= 1:
        return Check("prefill per sync", "ok", f"{detail}; in_flight costs none")
    return Check(
        "prefill per sync",
        "warn",
        f"{detail}: the engines prefill more than they generate",
        "set async_training.partial_rollout.mode to in_flight, which prefills nothing again, or lower "
        "async_training.staleness_threshold",
    )


def _snapshot(config: RunConfig, sizes: Sizes) -> Iterator[Check]:
    """Compare the time in which a worker writes its groups in flight, while its engine generates, with the limits."""
    checkpoint = config.checkpoint
    if not checkpoint.periodic:
        return
    seconds = sizes.in_flight_bytes / SNAPSHOT_BYTES_PER_S
    detail = f"up to {readable(sizes.in_flight_bytes)} of groups in flight per replica, {seconds:.1f} s at 1 GB/s"
    limits = (
        ("on_sigterm_s", checkpoint.on_sigterm_s, "a run that is ended by SIGTERM then has none of its last step"),
        ("every_s", checkpoint.every_s, "training then waits for each checkpoint"),
    )
    for key, limit, consequence in limits:
        if limit and seconds > limit:
            yield Check(
                "checkpoint",
                "warn",
                f"{detail}, longer than checkpoint.{key} ({limit:g} s): {consequence}",
                f"set checkpoint.{key} to {2 * seconds:.0f}, or lower rollout.max_response_tokens or "
                "rollout.max_num_seqs",
            )
            return
    yield Check("checkpoint", "ok", detail)
