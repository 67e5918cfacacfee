"""Counts the parameters of a model, and of the part of it that a trainer rank has, from the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.config.training import ParallelSection
from async_rl.models.config import ModelConfig
from async_rl.trainer.parallel import layers


@dataclass(frozen=True, slots=True)
class Parameters:
    """A number of parameters."""

    dense: int = 0
    """Outside of routed experts."""
    experts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """The parameters of one layer by how tensor parallelism lays them out."""

    cut: int
    """Each tensor-parallel rank has a part."""
    whole: int
    """Each has all of them: norms, the router, and latent attention's projections down."""
    experts: int


def layer_parameters(model: ModelConfig, layer: int) -> LayerParameters:
    """Count the parameters of a layer."""
    hidden = model.hidden_size
    cut, whole = _attention(model)
    whole += 2 * hidden
    if layer not in model.moe_layers:
        return LayerParameters(cut + 3 * hidden * model.intermediate_size, whole, 0)
    router = _router(model)
    shared = 3 * hidden * model.shared_intermediate_size
    return LayerParameters(cut + shared, whole + router, model.num_experts * 3 * hidden * model.moe_intermediate_size)


def _router(model: ModelConfig) -> int:
    return model.hidden_size * model.num_experts + (model.num_experts if model.expert_bias else 0)


def unquantized(model: ModelConfig) -> int:
    """Count the parameters to which rollout.quantization does nothing: embeddings, output layer, norms and routers."""
    norms = model.hidden_size * (2 * model.num_layers + 1)
    return _embeddings(model) + norms + len(model.moe_layers) * _router(model)


def _embeddings(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)


def parameters_of(model: ModelConfig) -> Parameters:
    """Count the parameters that a checkpoint of this shape has."""
    each = [layer_parameters(model, layer) for layer in range(model.num_layers)]
    dense = _embeddings(model) + model.hidden_size + sum(one.cut + one.whole for one in each)
    return Parameters(dense, sum(one.experts for one in each))


def layers_of(model: ModelConfig, sizes: ParallelSection, stage: int) -> list[int]:
    """Return the global numbers of the layers that a pipeline stage has, over all its virtual chunks."""
    return [layer for chunk in range(sizes.vpp) for layer in layers(model.num_layers, sizes, stage, chunk)]


def rank_parameters(model: ModelConfig, sizes: ParallelSection, stage: int) -> Parameters:
    """Count the parameters of one rank of a pipeline stage."""
    each = [layer_parameters(model, layer) for layer in layers_of(model, sizes, stage)]
    first, last = stage == 0, stage == sizes.pp - 1
    # With tied embeddings the last stage has a copy, unless the first is the last.
    matrices = first + (last and not (first and model.tie_word_embeddings))
    cut = sum(one.cut for one in each) + matrices * model.vocab_size * model.hidden_size
    whole = sum(one.whole for one in each) + last * model.hidden_size
    experts = sum(one.experts for one in each) // (sizes.ep * sizes.etp)
    return Parameters(cut // sizes.tp + whole, experts)


def _attention(model: ModelConfig) -> tuple[int, int]:
    """Return (parameters that tensor parallelism cuts, those that it does not)."""
    hidden, heads, latent = model.hidden_size, model.num_heads, model.latent
    if latent is None:
        queries, keys = heads * model.head_dim, model.num_kv_heads * model.head_dim
        biases = (queries + 2 * keys) * model.qkv_bias
        return hidden * (2 * queries + 2 * keys) + biases, 2 * model.head_dim * model.qk_norm
    query = heads * (latent.plain_dim + latent.rotary_dim)
    rank = latent.query_rank
    whole = hidden * (latent.key_value_rank + latent.rotary_dim) + latent.key_value_rank
    cut = latent.key_value_rank * heads * (latent.plain_dim + latent.value_dim) + heads * latent.value_dim * hidden
    if rank is None:
        return cut + hidden * query, whole
    return cut + rank * query, whole + hidden * rank + rank
