"""Whether a run fits into GPUs that this machine need not have, for ``async-rl plan memory``.

Computed from the settings and config.json alone: no weights are read, and nothing is started. The terms of a trainer
rank are those of ``estimate``; they were compared with running processes on CPUs only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from async_rl.config.loading import with_settings
from async_rl.config.schema import RunConfig
from async_rl.doctor import estimate
from async_rl.doctor.activations import largest_microbatch
from async_rl.doctor.estimate import BYTES, TrainerMemory
from async_rl.doctor.parameters import parameters_of
from async_rl.errors import AsyncRLError, ConfigError
from async_rl.models.config import ModelConfig, check_run, read_model_config
from async_rl.trainer.parallel import world_size

# Other values of settings, by dotted key.
Change = dict[str, Any]

GB = 10**9
# Assumed, not measured: CUDA's context and libraries, NCCL's buffers, what the allocator cannot use.
RANK_RESERVE, ENGINE_RESERVE = 4 * GB, 3 * GB
# vLLM's weight transfer receives packed tensors into two buffers of 1 GiB.
NCCL_BUFFERS = 2 * 2**30

_SPEC = re.compile(
    r"(?P<hosts>[1-9]\d{0,4})x(?P<gpus>[1-9]\d{0,2})x(?P<name>[A-Za-z][A-Za-z0-9]*)-(?P<gb>[1-9]\d{0,3})"
)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Hosts with GPUs that are alike."""

    hosts: int
    gpus: int
    """GPUs of each host."""
    name: str
    gb: int
    """Memory of each GPU in GB."""

    @classmethod
    def parse(cls, text: str) -> ClusterSpec:
        """Read HOSTSxGPUSxNAME-GB. Raises ConfigError."""
        found = _SPEC.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"--cluster-spec: {text[:80]!r} is not HOSTSxGPUSxNAME-GB, such as 4x8xH100-80 for four hosts of eight "
                "H100 with 80 GB each"
            )
        return cls(int(found["hosts"]), int(found["gpus"]), found["name"], int(found["gb"]))

    def __str__(self) -> str:
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        return f"{hosts} with {self.gpus} x {self.name} of {self.gb} GB"


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on one GPU of a rollout engine."""

    weights: int
    update: int
    """The experts of one layer, whole, while new weights are loaded, and what they are received into."""
    kv_cache: int
    """What is left for keys and values; negative if the weights alone do not fit. On a shared GPU what is set."""
    kv_token: int
    """What one token takes of it."""

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return max(0, self.kv_cache) // self.kv_token


def engine_memory(config: RunConfig, model: ModelConfig, gb: int) -> EngineMemory:
    """Estimate what one GPU of ``gb`` GB has of an engine."""
    rollout, itemsize = config.rollout, BYTES[config.engine_dtype]
    parameters, split = parameters_of(model), rollout.tensor_parallel_size
    dense, experts = estimate.engine_weights(config, model, parameters, gpu=True)
    weights = dense // split + experts // rollout.engine_ranks
    update = parameters.experts // max(1, len(model.moe_layers)) * itemsize
    if config.sync.backend == "nccl":
        update += NCCL_BUFFERS
    token = model.kv_token_bytes(config.kv_value_bytes)
    if model.latent is None:  # each GPU has its heads, and one at least; latent attention is whole on each
        token = token * max(1, model.num_kv_heads // split) // model.num_kv_heads
    cache = int(rollout.gpu_memory_utilization * gb * GB) - weights - ENGINE_RESERVE
    if config.resources.share_gpu:
        cache = rollout.kv_cache_bytes
    return EngineMemory(weights, update, cache, token)


def rank_memory(config: RunConfig, model: ModelConfig) -> TrainerMemory:
    """Estimate one trainer rank on a GPU."""
    return estimate.trainer_memory(config, model, gpu=True)


def rank_room(config: RunConfig, model: ModelConfig, gb: int) -> int:
    """Return the bytes of a GPU of ``gb`` GB that a trainer rank may take: all, or what an engine on it leaves."""
    update = engine_memory(config, model, gb).update if config.resources.share_gpu else 0
    return int((1 - config.engine_share) * gb * GB) - update


def plan_memory(config: RunConfig, spec: ClusterSpec) -> tuple[str, bool]:
    """Return a table of what a rank and an engine take, and whether all fit. Raises ModelError and ConfigError."""
    model = read_model_config(config.model.path)
    check_run(config, model)
    parameters = parameters_of(model)
    ranks, engines = world_size(config.trainer.parallel), config.rollout.replica_range.min
    size, hosts = config.rollout.engine_ranks, config.rollout.hosts_per_engine
    needed, present = ranks + engines * size, spec.hosts * spec.gpus
    whose = f"needed are {needed}, {ranks} for the trainer and {engines} x {size} for engines"
    if config.resources.share_gpu:
        needed, whose = 1, "needed is 1, which trainer and engine share"
    rank, engine = rank_memory(config, model), engine_memory(config, model, spec.gb)
    lines = [
        f"{model.architecture}, {parameters.total / 1e9:.2f} billion parameters, {parameters.experts / 1e9:.2f} of "
        f"them in experts, {config.model.dtype}",
        f"{spec}: {present} GPUs; {whose}",
        "",
        *_table(f"trainer rank ({_layout(config)})", _rank_rows(config, rank)),
        f"  {'total':<56}{(rank.total + RANK_RESERVE) / GB:8.1f} of {rank_room(config, model, spec.gb) / GB:.4g}",
        "",
        *_table(f"engine GPU ({_engine_layout(config)})", _engine_rows(config, engine, spec)),
    ]
    faults = []
    if needed > present:
        faults.append(f"{needed} GPUs are needed, and {spec} have {present}")
    if hosts > spec.hosts:
        faults.append(f"an engine over {hosts} hosts (rollout.hosts_per_engine), of which there are {spec.hosts}")
    elif (each := size // hosts) > spec.gpus:
        where = "them on one host" if hosts == 1 else f"{each} on each of {hosts} hosts"
        copies = config.rollout.data_parallel_size > 1
        change = "lower rollout.data_parallel_size" if copies else "raise rollout.hosts_per_engine"
        faults.append(f"an engine of {size} GPUs needs {where}, and one has {spec.gpus}; {change}")
    if (fault := rank_fault(config, model, spec)) is not None:
        faults.append(fault)
    faults += engine_faults(config, engine, spec)
    lines += ["", *(f"does not fit: {fault}" for fault in faults)] if faults else ["", "fits"]
    return "\n".join(lines) + "\n", not faults


def rank_fault(config: RunConfig, model: ModelConfig, spec: ClusterSpec) -> str | None:
    """Return that a trainer rank does not fit into a GPU, and what would make it fit; None if it fits."""
    if _rank_fits(config, model, spec):
        return None
    beside = " beside the engine" if config.resources.share_gpu else ""
    return f"a trainer rank does not fit{beside}{_instead(config, model, spec)}"


def _layout(config: RunConfig) -> str:
    sizes = config.trainer.parallel
    return " ".join(f"{name}{getattr(sizes, name)}" for name in ("dp", "tp", "ep", "etp", "pp", "cp"))


def _engine_layout(config: RunConfig) -> str:
    rollout = config.rollout
    copies = f", data_parallel_size {rollout.data_parallel_size}" * (rollout.data_parallel_size > 1)
    spans = f" over {rollout.hosts_per_engine} hosts" * (rollout.hosts_per_engine > 1)
    return f"tensor_parallel_size {rollout.tensor_parallel_size}{copies}{spans}"


def _rank_rows(config: RunConfig, rank: TrainerMemory) -> Iterator[tuple[str, int]]:
    optimizer = config.trainer.optimizer
    yield "parameters", rank.parameters
    yield f"gradients, {optimizer.gradient_dtype}", rank.gradients
    yield (
        "optimizer, its share"
        + f", {1 - optimizer.offload_fraction:.0%} on the GPU" * (optimizer.offload_fraction > 0),
        rank.optimizer,
    )
    if rank.reference:
        yield "reference policy", rank.reference
    recompute = {"none": "kept", "selective": "kept in part", "full": "recomputed"}[config.trainer.recompute]
    yield f"activations, {recompute}, {largest_microbatch(config)} positions", rank.activations
    if rank.logits > rank.working:
        yield "logits and their gradient", rank.logits
    else:
        yield "one layer's backward pass", rank.working
    # Activations and the update do not stand at once; the larger of the two counts.
    if (more := rank.update - rank.activations - max(rank.logits, rank.working)) > 0:
        yield "float32 gradients in an update, beyond the activations", more
    yield "CUDA, NCCL, fragmentation (assumed)", RANK_RESERVE


def _engine_rows(config: RunConfig, engine: EngineMemory, spec: ClusterSpec) -> Iterator[tuple[str, int]]:
    yield "weights", engine.weights
    yield "CUDA, NCCL, activations (assumed)", ENGINE_RESERVE
    yield f"keys and values, {engine.tokens} tokens", max(0, engine.kv_cache)
    share = config.rollout.gpu_memory_utilization
    yield f"outside of gpu_memory_utilization {share}", int((1 - share) * spec.gb * GB)
    if engine.update:
        buffers = " and NCCL's buffers" * (config.sync.backend == "nccl")
        yield f"of that, in a weight sync: one layer's experts{buffers}", engine.update


def _table(title: str, rows: Iterator[tuple[str, int]]) -> Iterator[str]:
    yield f"{title:<58}{'GB':>8}"
    for name, nbytes in rows:
        yield f"  {name:<56}{nbytes / GB:8.1f}"


def engine_faults(config: RunConfig, engine: EngineMemory, spec: ClusterSpec) -> Iterator[str]:
    """Yield what of an engine does not fit into a GPU, and what to set."""
    longest = config.data.max_prompt_tokens + config.longest_response
    if config.resources.share_gpu:
        yield from _shared_faults(config, engine, spec, longest)
        return
    if engine.kv_cache <= 0:
        yield (
            "an engine's weights; raise rollout.tensor_parallel_size or rollout.gpu_memory_utilization, or set "
            "rollout.quantization"
        )
    elif engine.tokens < longest:
        yield (
            f"one sequence of {longest} tokens into an engine's cache of {engine.tokens}; raise "
            "rollout.tensor_parallel_size or rollout.gpu_memory_utilization"
        )
    free = int((1 - config.rollout.gpu_memory_utilization) * spec.gb * GB)
    if engine.update > free:
        yield (
            f"a weight sync, for which an engine needs {engine.update / GB:.1f} GB beside its share of {free / GB:.1f} "
            "GB; lower rollout.gpu_memory_utilization"
        )


def _shared_faults(config: RunConfig, engine: EngineMemory, spec: ClusterSpec, longest: int) -> Iterator[str]:
    share = config.engine_share * spec.gb * GB
    if (taken := engine.weights + ENGINE_RESERVE + engine.kv_cache) > share:
        yield (
            f"an engine of {taken / GB:.1f} GB into its share of {share / GB:.1f} GB; lower rollout.kv_cache_bytes, or "
            "raise rollout.gpu_memory_utilization"
        )
    if engine.tokens < longest:
        yield (
            f"one sequence of {longest} tokens into an engine's cache of {engine.tokens}; raise rollout.kv_cache_bytes"
        )


def _instead(config: RunConfig, model: ModelConfig, spec: ClusterSpec) -> str:
    """Return what to set so that a rank fits.

    That is each setting that does it alone, or else the first that does it with recomputation and short microbatches.
    """
    lighter, larger = _lighter(config), [*_larger(config), _offloaded(config)]
    every = {key: value for change in lighter for key, value in change.items()}
    alone = [change for change in (*lighter, *larger) if _fits(config, change, model, spec)]
    together = [every, *(every | change for change in larger)]
    found = alone or [change for change in together if _fits(config, change, model, spec)][:1]
    if not found:
        if config.resources.share_gpu:
            return "; lower rollout.gpu_memory_utilization, or set resources.share_gpu to false on two GPUs"
        return "; use more GPUs for the trainer (trainer.parallel)"
    return "; it would with " + " or with ".join(
        ", ".join(f"{key} {value}" for key, value in change.items()) for change in found
    )


def _lighter(config: RunConfig) -> list[Change]:
    """Return the settings with which the same ranks take less."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    found: list[Change] = []
    if config.trainer.recompute != "full":
        found.append({"trainer.recompute": "full"})
    if config.trainer.tokens_per_microbatch > longest:
        found.append({"trainer.tokens_per_microbatch": longest})
    optimizer = config.trainer.optimizer
    if config.model.dtype == "bfloat16" and optimizer.gradient_dtype == "float32" and optimizer.offload_fraction == 0:
        key = "trainer.optimizer."
        lower = {f"{key}{name}": "bfloat16" for name in ("gradient_dtype", "first_moment_dtype", "second_moment_dtype")}
        found.append(lower)
    return found


def _offloaded(config: RunConfig) -> Change:
    """Return the change that takes the optimizer's states off the GPU, at the cost of a transfer each step."""
    moments = {f"trainer.optimizer.{name}_moment_dtype": "float32" for name in ("first", "second")}
    kept = {key: value for key, value in moments.items() if getattr(config.trainer.optimizer, key[18:]) != value}
    return {"trainer.optimizer.offload_fraction": 1.0} | kept


def _larger(config: RunConfig) -> list[Change]:
    """Return the layouts with twice the ranks of one kind."""
    sizes = config.trainer.parallel
    changes: list[Change] = [
        {f"trainer.parallel.{name}": 2 * getattr(sizes, name)} for name in ("ep", "pp", "tp", "dp")
    ]
    if sizes.layers_per_stage is not None:  # they are of so many stages
        changes[1]["trainer.parallel.layers_per_stage"] = None
    return changes


def _fits(config: RunConfig, change: Change, model: ModelConfig, spec: ClusterSpec) -> bool:
    """Return whether a rank fits with other settings; not if these cannot be."""
    try:
        changed = with_settings(config, change)
        check_run(changed, model)
    except AsyncRLError:
        return False
    return _rank_fits(changed, model, spec)


def _rank_fits(config: RunConfig, model: ModelConfig, spec: ClusterSpec) -> bool:
    return rank_memory(config, model).total + RANK_RESERVE <= rank_room(config, model, spec.gb)
