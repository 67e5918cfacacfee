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
from async_rl.models.config import ModelConfig
from async_rl.models.headers import read_header
from async_rl.trainer.parallel import world_size

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
# Memory of one process before weights and caches, measured with a tiny model, shared libraries counted once: an engine
# with its client (libraries, activations at warm-up), what vLLM takes in addition where it compiles the model, a
# trainer rank, the driver with Ray's own processes.
ENGINE_BYTES, COMPILED_BYTES = int(1.3 * 10**9), int(0.9 * 10**9)
TRAINER_BYTES, DRIVER_BYTES = int(0.7 * 10**9), int(0.7 * 10**9)
# Gradients are summed in float32 whatever the parameters' type; AdamW keeps two moments in float32.
GRADIENT_BYTES, MOMENT_BYTES, MASTER_BYTES = 4, 8, 4
# What log-probs and their gradient take over the bytes of the logits: these, their gradient in the same type, and
# blocks of rows in float32 (``trainer.logprobs``; ``tests.bench.memory`` measures up to 1.2 beside the logits).
LOGITS_FACTOR = 2.2


@dataclass(frozen=True, slots=True)
class Parameters:
    """The number of parameters in a checkpoint's files."""

    dense: int = 0
    """Outside of routed experts."""
    experts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Bytes of the tensors of one trainer rank at the peak of a training step."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    """Bytes of the reference policy, and of the own weights while it is loaded."""
    activations: int
    """Kept for the backward pass."""
    logits: int

    @property
    def fixed(self) -> int:
        """Those that do not depend on the microbatch."""
        return self.parameters + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> int:
        """All of them."""
        return self.fixed + self.activations + self.logits


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Bytes that the processes of a run on CPU take, without the queue's payloads."""

    driver: int
    engines: int
    """All engines, each with its worker and its whole KV cache."""
    trainer: int
    """All ranks, between two microbatches."""
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


def trainer_memory(config: RunConfig, model: ModelConfig, parameters: Parameters, *, gpu: bool) -> TrainerMemory:
    """Estimate one trainer rank. gpu: whether Megatron's distributed optimizer keeps the states, or torch's AdamW."""
    sizes, itemsize = config.trainer.parallel, BYTES[config.model.dtype]
    dense = parameters.dense // (sizes.tp * sizes.pp)
    experts = parameters.experts // (sizes.ep * sizes.etp * sizes.pp)
    per_state = MOMENT_BYTES + (MASTER_BYTES if itemsize < 4 else 0)
    states = dense + experts
    if gpu:  # Spread over the ranks that have the same parameters, with a float32 copy in any case.
        per_state = MOMENT_BYTES + MASTER_BYTES
        same = sizes.dp * sizes.cp
        states = dense // same + experts // max(1, same * sizes.tp // (sizes.ep * sizes.etp))
    positions = largest_microbatch(config) // sizes.cp
    logits = int(positions * (model.vocab_size // sizes.tp) * itemsize * LOGITS_FACTOR)
    return TrainerMemory(
        parameters=(dense + experts) * itemsize,
        gradients=(dense + experts) * GRADIENT_BYTES,
        optimizer=states * per_state,
        reference=2 * (dense + experts) * itemsize if config.trainer.loss.kl != "none" and not gpu else 0,
        activations=positions * activation_bytes(config, model) // sizes.tp,
        logits=logits,
    )


def largest_microbatch(config: RunConfig) -> int:
    """Return the most positions of a microbatch: what sequences are packed up to, or one longer sequence alone."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1
    most = config.trainer.groups_per_step * config.rollout.n * longest
    return max(longest, min(config.trainer.tokens_per_microbatch, most))


def activation_bytes(config: RunConfig, model: ModelConfig) -> int:
    """Return the bytes per position that a rank without tensor parallelism keeps for the backward pass.

    Pipeline stages divide the layers, but the first stage has as many microbatches under way as there are stages.
    """
    itemsize = BYTES[config.model.dtype]
    layers = [_layer_elements(model, moe=layer in model.moe_layers) for layer in range(model.num_layers)]
    if config.trainer.recompute == "full":  # The input of each layer, and all of the layer that is computed again.
        return itemsize * (model.num_layers * model.hidden_size + max(layers))
    return itemsize * (sum(layers) + 2 * model.hidden_size)  # the embedding's output, and the last norm's


def engine_memory(config: RunConfig, model: ModelConfig | None, parameters: Parameters) -> int:
    """Estimate one engine and its worker on CPU; without a model, what they take before weights."""
    itemsize = BYTES[config.engine_dtype]
    # vLLM packs the output layer for its kernel and keeps the original; what it packs of the rest replaces it.
    head = 0 if model is None else model.vocab_size * model.hidden_size
    # On CPU vLLM does not compile MoE models here (``rollout.engine.vllm.process``).
    compiled = not (config.rollout.enforce_eager or (model is not None and model.moe_layers))
    base = ENGINE_BYTES + (COMPILED_BYTES if compiled else 0)
    return base + config.rollout.kv_cache_bytes + (parameters.total + head) * itemsize


def run_memory(
    config: RunConfig, model: ModelConfig | None, parameters: Parameters, engines: int | None = None
) -> RunMemory:
    """Estimate a run on CPU; without a model, what it takes before weights. ``engines``: None for the fewest."""
    engines = config.rollout.replica_range.min if engines is None else engines
    ranks = world_size(config.trainer.parallel)
    rank = None if model is None else trainer_memory(config, model, parameters, gpu=False)
    return RunMemory(
        driver=DRIVER_BYTES,
        engines=engines * engine_memory(config, model, parameters),
        trainer=ranks * (TRAINER_BYTES + (0 if rank is None else rank.fixed)),
        microbatch=0 if rank is None else ranks * (rank.activations + rank.logits),
        shared_weights=shared_weights(config, parameters),
    )


def shared_weights(config: RunConfig, parameters: Parameters) -> int:
    """Return the bytes of the copy in shared memory that a weight sync leaves for all engines of the host."""
    return 0 if config.sync_backend == "nccl" else parameters.total * BYTES[config.model.dtype]


def _layer_elements(model: ModelConfig, *, moe: bool) -> int:
    """Return the numbers per position that one layer keeps for the backward pass."""
    hidden = model.hidden_size
    elements = 4 * hidden  # input and output of both norms
    latent = model.latent
    if latent is None:
        heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        # The projection's output; query and key with positions; attention's output by sequence, and joined.
        elements += (heads + 2 * kv_heads) + (heads + kv_heads) + 2 * heads
    else:
        query = latent.plain_dim + latent.rotary_dim
        compressed = 2 * (latent.key_value_rank + latent.rotary_dim) + 2 * (latent.query_rank or 0)
        elements += compressed + model.num_heads * (4 * query + 4 * latent.value_dim)
    if not moe:
        return elements + 4 * model.intermediate_size  # both projections up, the gate's activation, the product
    # A copy of the position for each of its experts, the same four per expert and the product weighted, its output.
    routed = model.top_k * (2 * hidden + 5 * model.moe_intermediate_size)
    return elements + routed + 4 * model.shared_intermediate_size + 4 * model.num_experts
