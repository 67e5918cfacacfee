"""What a checkpoint folder says about its model, read from config.json alone, and whether a run fits it.

Light on purpose: no torch, no Megatron, no transformers, so that every room and ``doctor`` can ask. Knows
``config``, ``errors``, ``types``. Building the model is the trainer's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from async_rl.config import RunConfig
from async_rl.errors import ModelError
from async_rl.types import RoutingSpec

# Architectures that the table in weights/names.py covers.
SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Qwen3 or Qwen3-MoE model.

    moe_layers: 0-based numbers of the layers whose MLP is a mixture of experts, ascending; empty for a dense
    model. num_experts, top_k and moe_intermediate_size are 0 for a dense model.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int = 0
    top_k: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    moe_layers: tuple[int, ...] = ()

    @property
    def routing(self) -> RoutingSpec | None:
        """How one row of routing looks; None for a dense model."""
        if not self.moe_layers:
            return None
        return RoutingSpec(num_moe_layers=len(self.moe_layers), top_k=self.top_k, num_experts=self.num_experts)


def read_model_config(path: Path) -> ModelConfig:
    """Read ``path``/config.json. Raises ModelError naming the folder or key, its value and the mend."""
    values = _read_json(path)
    architecture = (values.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelError(
            f"model.path {path}: architecture {architecture} is not supported; "
            f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    fields = _Fields(path, values)
    _refuse_variants(path, values)
    heads = fields.positive("num_attention_heads")
    kv_heads = fields.positive("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ModelError(
            f"model.path {path}: config.json: num_attention_heads ({heads}) is not a multiple of "
            f"num_key_value_heads ({kv_heads})"
        )
    num_layers = fields.positive("num_hidden_layers")
    dense = ModelConfig(
        architecture=architecture,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=fields.positive("hidden_size"),
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        # Qwen3 sets the head size apart from hidden_size / heads; the quotient is only the fallback.
        head_dim=fields.positive("head_dim", default=fields.positive("hidden_size") // heads),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(path, values),
        max_position_embeddings=fields.positive("max_position_embeddings"),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
    )
    if architecture == "Qwen3ForCausalLM":
        return dense
    return _with_experts(path, dense, fields)


def routing_spec(path: Path) -> RoutingSpec | None:
    """How one row of routing looks for the model in ``path``; None for a dense model."""
    return read_model_config(path).routing


def check_run(config: RunConfig, model: ModelConfig) -> None:
    """Raise ModelError if the settings cannot work with this model. Nothing is started before this passed."""
    if config.trainer.router_replay != "off" and model.routing is None:
        raise ModelError(
            f"trainer.router_replay is {config.trainer.router_replay}, but {config.model.path} "
            f"({model.architecture}) has no MoE layer, hence no routing to replay; "
            "set trainer.router_replay to off"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > model.max_position_embeddings:
        raise ModelError(
            f"data.max_prompt_tokens ({config.data.max_prompt_tokens}) + rollout.max_response_tokens "
            f"({config.rollout.max_response_tokens}) is {longest}, above the {model.max_position_embeddings} "
            f"positions of {config.model.path} (max_position_embeddings); lower one of the two"
        )


def checkpoint_shards(path: Path) -> list[Path]:
    """The *.safetensors files of a checkpoint folder, all present. Raises ModelError naming what is not."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise ModelError(f"model.path {path}: {index.name} is not a safetensors index ({error})") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"model.path {path}: {index.name} lists {', '.join(missing[:5])}, which the folder lacks; "
                "copy or download the checkpoint again"
            )
        return [path / name for name in names]
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"model.path {path}: no *.safetensors file; a Hugging Face checkpoint folder is needed")
    return shards


class _Fields:
    """Reads integers out of config.json, with an error that names the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def positive(self, *names: str, default: int | None = None) -> int:
        """The first of ``names`` that is set."""
        value = next((self.values[name] for name in names if self.values.get(name) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(
                f"model.path {self.path}: config.json: {names[0]} is {value!r}, expected a positive integer"
            )
        return value

    def integers(self, name: str) -> list[int]:
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise ModelError(f"model.path {self.path}: config.json: {name} is {value!r}, expected a list of layers")
        return value


def _with_experts(path: Path, dense: ModelConfig, fields: _Fields) -> ModelConfig:
    # transformers 5 writes num_local_experts where earlier versions wrote num_experts.
    experts = fields.positive("num_experts", "num_local_experts")
    top_k = fields.positive("num_experts_per_tok")
    if top_k > experts:
        raise ModelError(
            f"model.path {path}: config.json: num_experts_per_tok ({top_k}) exceeds num_experts ({experts})"
        )
    dense_layers = set(fields.integers("mlp_only_layers"))
    step = fields.positive("decoder_sparse_step", default=1)
    return replace(
        dense,
        num_experts=experts,
        top_k=top_k,
        moe_intermediate_size=fields.positive("moe_intermediate_size"),
        norm_topk_prob=bool(fields.values.get("norm_topk_prob", False)),
        moe_layers=tuple(i for i in range(dense.num_layers) if i not in dense_layers and (i + 1) % step == 0),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ModelError(f"model.path {path}: no such folder")
    file = path / "config.json"
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise ModelError(f"model.path {path}: config.json: {error.strerror}; a Hugging Face folder has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"model.path {path}: config.json is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"model.path {path}: config.json holds a {type(values).__name__}, expected an object")
    return values


def _refuse_variants(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse what the two families allow but this trainer would compute differently from the engine."""
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        value = values.get(key, wanted)
        if value != wanted:
            raise ModelError(f"model.path {path}: config.json: {key} is {value!r}; only {wanted!r} is supported")


def _rope_theta(path: Path, values: Mapping[str, Any]) -> float:
    """transformers 5 nests it in rope_parameters; before, it stood at the top beside rope_scaling."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ModelError(f"model.path {path}: config.json: rope_type is {kind!r}; only 'default' is supported")
    # 10000 is what transformers assumes for a Qwen3 configuration that names none.
    return float(parameters.get("rope_theta", values.get("rope_theta", 10000.0)))
