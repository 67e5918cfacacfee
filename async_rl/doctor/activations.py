"""Estimates what a trainer rank keeps of a forward pass for the backward pass, from settings and shape.

Shapes: T positions of the largest microbatch, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.config.schema import RunConfig
from async_rl.doctor.parameters import layers_of
from async_rl.models.config import ModelConfig


def largest_microbatch(config: RunConfig) -> int:
    """Return the most positions of a microbatch: what sequences are packed up to, or one longer sequence alone."""
    longest = _longest(config)
    most = config.trainer.groups_per_step * config.rollout.n * longest
    return max(longest, min(config.trainer.tokens_per_microbatch, most))


@dataclass(frozen=True, slots=True)
class Elements:
    """Numbers per position that a rank holds, before tensor parallelism divides them."""

    kept: int
    """From the forward pass, over all microbatches under way."""
    working: int
    """In addition while a layer is computed backwards: what is computed again, and gradients."""


def stage_elements(config: RunConfig, model: ModelConfig, stage: int) -> Elements:
    """Return what a rank of a pipeline stage holds at most.

    An earlier stage has more microbatches under way than a later one.
    """
    sizes, hidden = config.trainer.parallel, model.hidden_size
    here = layers_of(model, sizes, stage)
    each = [layer_elements(config, model, layer) for layer in here]
    again = 0
    if config.trainer.recompute == "full":
        each, again = _recomputed(config, each, hidden)
    elif config.trainer.recompute == "selective":
        plain = config.model_copy(update={"trainer": config.trainer.model_copy(update={"recompute": "none"})})
        again = max(layer_elements(plain, model, layer) for layer in here) - max(each)
    first, last = stage == 0, stage == sizes.pp - 1
    # The embedding's output, or what the stage before has sent; of the last stage, the last norm's input.
    kept = _under_way(config, stage) * (sum(each) + (hidden if first or sizes.pp > 1 else 0)) + (hidden if last else 0)
    return Elements(int(kept), again + max(_gradients(config, model, layer) for layer in here))


def _gradients(config: RunConfig, model: ModelConfig, layer: int) -> int:
    """Return the gradients of a layer's activations at one moment, those sent to other ranks, and gathered rows."""
    moe = layer in model.moe_layers
    width = model.top_k * model.moe_intermediate_size if moe else model.intermediate_size
    sent = 2 * model.top_k * model.hidden_size if moe and config.trainer.parallel.ep > 1 else 0
    return model.hidden_size + 2 * width + sent + 2 * model.hidden_size * (config.trainer.parallel.tp - 1)


def layer_elements(config: RunConfig, model: ModelConfig, layer: int) -> int:
    """Return the numbers per position that one layer keeps for the backward pass, recomputed modules left out."""
    hidden, latent = model.hidden_size, model.latent
    selected = set(config.trainer.recompute_modules) if config.trainer.recompute == "selective" else set()
    offloaded = set(config.trainer.offload_activations)
    elements = 6 * hidden  # input and output of both norms, and what each block adds to the stream
    elements -= hidden * len(offloaded & {"attn_norm", "qkv_linear", "mlp_norm"})
    if latent is None:
        heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        core = heads + 2 * kv_heads + 2 * heads  # query, key, value; attention's output by sequence, and joined
        # The projection's output; query and key with positions; attention's output by sequence, and joined.
        elements += (heads + 2 * kv_heads) + (heads + kv_heads) + 2 * heads
    else:
        query = latent.plain_dim + latent.rotary_dim
        compressed = 2 * (latent.key_value_rank + latent.rotary_dim) + 2 * (latent.query_rank or 0)
        heads, core = model.num_heads * latent.value_dim, model.num_heads * (2 * query + 2 * latent.value_dim)
        elements += compressed + model.num_heads * (4 * query + 4 * latent.value_dim)
    elements -= core * ("core_attn" in offloaded) + heads * ("attn_proj" in offloaded)
    if layer not in model.moe_layers:
        if "mlp" in selected:
            return elements
        return elements + 4 * model.intermediate_size  # both projections up, the gate's activation, the product
    if "moe" in selected:
        return elements
    # A copy of the position for each of its experts, the same four per expert and the product weighted, its output.
    routed = model.top_k * (2 * hidden + 5 * model.moe_intermediate_size)
    if config.trainer.parallel.ep > 1:
        routed += model.top_k * hidden  # what other ranks have sent, before it is sorted by expert
    routed -= model.top_k * hidden * ("expert_fc1" in offloaded)
    routed -= model.top_k * 3 * model.moe_intermediate_size * ("moe_act" in (offloaded | selected))
    shared = 0 if "shared_experts" in selected else 4 * model.shared_intermediate_size
    return elements + routed + shared + 4 * model.num_experts


def _longest(config: RunConfig) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1


def _recomputed(config: RunConfig, each: list[int], hidden: int) -> tuple[list[int], int]:
    """Return what is kept with full recomputation, and what is computed again at one moment."""
    unit = config.trainer.recompute_num_layers
    if config.trainer.recompute_method == "block":
        # The last layers come first in a backward pass: what they kept is gone when the first are computed again.
        return [hidden] * min(unit, len(each)) + each[unit:], max(0, max(each[:unit]) - sum(each[unit:]))
    units = [sum(each[start : start + unit]) for start in range(0, len(each), unit)]
    return [hidden] * len(units), max(units)


def _under_way(config: RunConfig, stage: int) -> float:
    """Return the most microbatches that a stage has begun and not ended; with virtual stages, parts of one count."""
    sizes = config.trainer.parallel
    positions = config.trainer.groups_per_step * config.rollout.n * _longest(config)
    count = max(1, -(-positions // (sizes.dp * largest_microbatch(config))))
    if sizes.vpp == 1:
        return min(sizes.pp - stage, count)
    chunks = 2 * (sizes.pp - stage - 1) + (sizes.vpp - 1) * sizes.pp + 1
    return min(chunks, count * sizes.vpp) / sizes.vpp
