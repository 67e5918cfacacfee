"""Estimates the memory that a trainer rank and an engine take, from the settings, config.json and the weight files.

Pure but for the headers of the files. Every term is what some tensor of the running process takes;
``tests/bench/trainer_memory.py`` compares them with such a process.

Shapes: T positions of the largest microbatch, V vocabulary, H hidden size, b bytes per parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from async_rl.config.fields import Dtype
from async_rl.config.schema import RunConfig
from async_rl.doctor.activations import largest_microbatch, stage_elements
from async_rl.doctor.parameters import Parameters, rank_parameters, unquantized
from async_rl.models.config import ModelConfig
from async_rl.models.headers import read_header
from async_rl.trainer.parallel import world_size

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
# Memory of one process before weights and caches, measured with a tiny model, shared libraries counted once: an engine
# with its client (libraries, activations at warm-up), what vLLM takes in addition where it compiles the model, a
# trainer rank, the driver with Ray's own processes.
ENGINE_BYTES, COMPILED_BYTES = int(1.3 * 10**9), int(0.9 * 10**9)
TRAINER_BYTES, DRIVER_BYTES = int(0.7 * 10**9), int(0.7 * 10**9)
# Of AdamW: gradients and two moments in float32, and a float32 copy of parameters of a smaller type.
GRADIENT_BYTES, MOMENT_BYTES, MASTER_BYTES = 4, 8, 4
# What log-probs and their gradient take over the bytes of the logits: these, their gradient in the same type, and
# blocks of rows in float32 (``trainer.logprobs``; ``tests.bench.memory`` measures up to 1.2 beside the logits).
LOGITS_FACTOR = 2.2


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Bytes of the tensors of one trainer rank at the peak of a training step."""

    parameters: int
    gradients: int
    optimizer: int
    update: int
    """What the optimizer's update takes in addition, when the activations are gone."""
    reference: int
    """Bytes of the reference policy, and of the own weights while it is loaded."""
    activations: int
    """Kept for the backward pass."""
    working: int
    """What is computed again in the backward pass of a layer, and gradients of its activations."""
    logits: int
    """The logits and what is made of them; they are gone when the layers are computed backwards."""

    @property
    def fixed(self) -> int:
        """Those that do not depend on the microbatch."""
        return self.parameters + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> int:
        """The most at one moment."""
        return self.fixed + max(self.activations + max(self.logits, self.working), self.update)


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Bytes that the processes of a run on CPU take, without the queue's payloads."""

    driver: int
    engines: int
    """All engines, each with its worker and its whole KV cache."""
    trainer: int
    """All ranks, between two microbatches, and the copy of the weights that sync.delta keeps on one of them."""
    microbatch: int
    """What all ranks take in addition while each computes the largest microbatch that the settings allow."""
    shared_weights: int

    @property
    def fixed(self) -> int:
        """What the run takes however short its responses are."""
        return self.driver + self.engines + self.trainer + self.shared_weights

    @property
    def total(self) -> int:
        """What the run takes with responses as long as the settings allow."""
        return self.fixed + self.microbatch


def count_parameters(folder: Path, model: ModelConfig) -> Parameters:
    """Count the parameters of a checkpoint that are built, from the headers of its files, whatever their type.

    Raises ValueError where a file is not in safetensors format.
    """
    dense = experts = 0
    unbuilt = tuple(f"model.layers.{model.num_layers + n}." for n in range(model.extra_layers))
    for file in folder.glob("*.safetensors"):
        for name, header in read_header(file).items():
            if name.startswith(unbuilt):
                continue
            if name == "lm_head.weight" and model.tie_word_embeddings:
                continue
            count = math.prod(header.shape)
            if ".experts." in name:
                experts += count
            else:
                dense += count
    return Parameters(dense, experts)


def trainer_memory(config: RunConfig, model: ModelConfig, *, gpu: bool) -> TrainerMemory:
    """Estimate one rank of the pipeline stage that takes most.

    gpu: whether Megatron's distributed optimizer keeps the states, or torch's AdamW.
    """
    stages = range(config.trainer.parallel.pp)
    return max((stage_memory(config, model, stage, gpu=gpu) for stage in stages), key=lambda memory: memory.total)


def stage_memory(config: RunConfig, model: ModelConfig, stage: int, *, gpu: bool) -> TrainerMemory:
    """Estimate one trainer rank of a pipeline stage; see ``trainer_memory``."""
    sizes, itemsize, optimizer = config.trainer.parallel, BYTES[config.model.dtype], config.trainer.optimizer
    mine = rank_parameters(model, sizes, stage)
    states = mine.total
    if gpu:  # Spread over the ranks that have the same parameters.
        same = sizes.dp * sizes.cp
        states = mine.dense // same + mine.experts // max(1, same * sizes.tp // (sizes.ep * sizes.etp))
    gradient = BYTES[optimizer.gradient_dtype]
    positions = largest_microbatch(config) // sizes.cp
    logits = positions * (model.vocab_size // sizes.tp) * itemsize * LOGITS_FACTOR
    elements = stage_elements(config, model, stage)
    return TrainerMemory(
        parameters=mine.total * itemsize,
        gradients=mine.total * gradient,
        optimizer=int(states * _state_bytes(config, gpu=gpu) * (1 - optimizer.offload_fraction)),
        # AdamW's kernels take gradients in float32.
        update=states * GRADIENT_BYTES if gradient < GRADIENT_BYTES and not _knows_types(config) else 0,
        reference=2 * mine.total * itemsize if config.trainer.loss.kl != "none" and not gpu else 0,
        activations=positions * elements.kept * itemsize // sizes.tp,
        working=positions * elements.working * itemsize // sizes.tp,
        logits=int(logits) if stage == sizes.pp - 1 else 0,
    )


def _knows_types(config: RunConfig) -> bool:
    """Return whether Megatron's optimizer is the one that takes gradients and keeps moments in any type."""
    optimizer = config.trainer.optimizer
    moments = {optimizer.first_moment_dtype, optimizer.second_moment_dtype}
    return optimizer.offload_fraction > 0 or moments != {"float32"}


def _state_bytes(config: RunConfig, *, gpu: bool) -> int:
    """Return the bytes of the optimizer's states per parameter."""
    optimizer, itemsize = config.trainer.optimizer, BYTES[config.model.dtype]
    moments = BYTES[optimizer.first_moment_dtype] + BYTES[optimizer.second_moment_dtype]
    if not gpu:
        return moments + (MASTER_BYTES if itemsize < MASTER_BYTES else 0)
    # A float32 copy in any case; the optimizer that knows types keeps the half of it that bfloat16 lacks.
    halves = _knows_types(config) and optimizer.offload_fraction == 0 and itemsize < MASTER_BYTES
    return moments + (MASTER_BYTES // 2 if halves else MASTER_BYTES)


def engine_weights(
    config: RunConfig, model: ModelConfig | None, parameters: Parameters, *, gpu: bool
) -> tuple[int, int]:
    """Return the bytes of an engine's weights: of what each data-parallel rank has a copy of, and of the experts."""
    itemsize = BYTES[config.engine_dtype]
    if config.rollout.quantization is None or model is None:
        return parameters.dense * itemsize, parameters.experts * itemsize
    kept = unquantized(model)
    dense = kept * itemsize + parameters.dense - kept
    return dense, parameters.experts * (1 if gpu else itemsize)  # on a CPU it is of linear layers alone


def engine_memory(config: RunConfig, model: ModelConfig | None, parameters: Parameters) -> int:
    """Estimate one engine and its worker on CPU; without a model, what they take before weights."""
    # vLLM packs the output layer for its kernel and keeps the original; what it packs of the rest replaces it.
    head = 0 if model is None else model.vocab_size * model.hidden_size
    # On CPU vLLM does not compile MoE models here (``rollout.engine.vllm.process``).
    compiled = not (config.rollout.enforce_eager or (model is not None and model.moe_layers))
    base = ENGINE_BYTES + (COMPILED_BYTES if compiled else 0)
    dense, experts = engine_weights(config, model, parameters, gpu=False)
    copies = config.rollout.data_parallel_size * (dense + head * BYTES[config.engine_dtype])
    return config.rollout.engine_ranks * base + config.rollout.kv_cache_bytes + copies + experts


def run_memory(
    config: RunConfig, model: ModelConfig | None, parameters: Parameters, engines: int | None = None
) -> RunMemory:
    """Estimate a run on CPU; without a model, what it takes before weights. ``engines``: None for the fewest."""
    engines = config.rollout.replica_range.min if engines is None else engines
    ranks = world_size(config.trainer.parallel)
    rank = None if model is None else trainer_memory(config, model, gpu=False)
    return RunMemory(
        driver=DRIVER_BYTES,
        engines=engines * engine_memory(config, model, parameters),
        trainer=ranks * (TRAINER_BYTES + (0 if rank is None else rank.fixed)) + sent_copy(config, parameters),
        microbatch=0 if rank is None else ranks * (rank.total - rank.fixed),
        shared_weights=shared_weights(config, parameters),
    )


def sent_copy(config: RunConfig, parameters: Parameters) -> int:
    """Return the bytes of the weights sent last, which trainer rank 0 keeps in its host's memory with sync.delta."""
    if config.sync_backend != "object_store" or config.sync.delta.full_every == 1:
        return 0
    return parameters.total * BYTES[config.model.dtype]


def shared_weights(config: RunConfig, parameters: Parameters) -> int:
    """Return the bytes of the copy in shared memory that a weight sync leaves for all engines of the host."""
    return 0 if config.sync_backend == "nccl" else parameters.total * BYTES[config.model.dtype]
