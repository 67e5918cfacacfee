"""The model's shape, read from the config.json of a checkpoint folder, and whether a run's settings fit it.

Light on purpose: no torch, no Megatron, no transformers, so that every room and ``doctor`` can import it. Knows
``config``, ``errors`` and ``types``; the trainer builds the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from async_rl.config.schema import RunConfig
from async_rl.errors import ModelError
from async_rl.models.headers import check_plain, read_headers
from async_rl.models.quantization import refuse_quantized
from async_rl.types import RoutingSpec

ScoreFunction = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rotary embeddings stretched to longer contexts (arXiv:2309.00071), with config.json's names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (MLA, arXiv:2405.04434)."""

    query_rank: int | None
    """Rank of the compressed query; None if it is not compressed."""
    key_value_rank: int
    """Rank of the compressed key and value."""
    plain_dim: int
    """Size of a head's part without position."""
    rotary_dim: int
    """Size of a head's rotary part."""
    value_dim: int
    """Size of a head's value."""
    yarn: Yarn | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a supported model."""

    architecture: str
    """The class name in config.json, a key of ``FAMILIES``."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense MLPs."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Size of a head of ordinary attention."""
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    """Whether input and output embeddings are one parameter."""
    qk_norm: bool = False
    """Whether q and k have a norm per head; for ordinary attention."""
    qkv_bias: bool = False
    """Whether q, k and v have biases; for ordinary attention."""
    rotary_fraction: float = 1.0
    """The part of a head that is rotated."""
    latent: LatentAttention | None = None
    """Multi-head latent attention; None for ordinary attention."""
    extra_layers: int = 0
    """Layers past the last that the checkpoint may have, for multi-token prediction; they are not built."""
    moe_layers: tuple[int, ...] = ()
    """0-based numbers, ascending, of the layers whose MLP is a mixture of experts. If empty, the model is dense and the
    fields below have no meaning."""
    num_experts: int = 0
    top_k: int = 0
    """Experts per token."""
    moe_intermediate_size: int = 0
    """Width of one routed expert."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts are normalized to 1."""
    score_function: ScoreFunction = "softmax"
    """How the router's logits become scores."""
    expert_bias: bool = False
    """Whether a bias is added to the scores for the choice of experts alone."""
    num_groups: int = 0
    """Groups of experts; 0 without groups."""
    group_top_k: int = 0
    """Best groups that a token's experts are chosen from; 0 without groups."""
    scaling: float = 1.0
    """Factor on the weights of routed experts."""
    shared_intermediate_size: int = 0
    """Width of all shared experts together, which every token goes to."""

    def sequence_cost(self, positions: int) -> float:
        """Return the FLOPs of a forward pass over one sequence.

        They are 2 for each parameter that a token meets, including the output layer, and causal attention, which grows
        with the square of the positions.
        """
        latent = self.latent
        query_dim = self.head_dim if latent is None else latent.plain_dim + latent.rotary_dim
        value_dim = self.head_dim if latent is None else latent.value_dim
        if latent is None:
            attention = self.hidden_size * (self.num_heads + self.num_kv_heads) * 2 * self.head_dim
        else:
            query = self.num_heads * query_dim
            attention = (
                self.hidden_size * (latent.key_value_rank + latent.rotary_dim + self.num_heads * value_dim)
                + (
                    self.hidden_size * query
                    if latent.query_rank is None
                    else (self.hidden_size + query) * latent.query_rank
                )
                + latent.key_value_rank * self.num_heads * (latent.plain_dim + value_dim)
            )
        experts = self.top_k * self.moe_intermediate_size + self.shared_intermediate_size
        dense_layers = self.num_layers - len(self.moe_layers)
        mlp = 3 * self.hidden_size * (dense_layers * self.intermediate_size + len(self.moe_layers) * experts)
        parameters = self.num_layers * attention + mlp + self.hidden_size * self.vocab_size
        pairs = positions * (positions + 1) / 2
        return 2.0 * parameters * positions + 2.0 * pairs * self.num_layers * self.num_heads * (query_dim + value_dim)

    def kv_token_bytes(self, value_bytes: int) -> int:
        """Return the bytes that one token takes in an engine's KV cache, over all layers."""
        latent = self.latent
        heads = 2 * self.num_kv_heads * self.head_dim
        elements = heads if latent is None else latent.key_value_rank + latent.rotary_dim
        return self.num_layers * elements * value_bytes

    @property
    def routing_spec(self) -> RoutingSpec | None:
        """The layout of routed experts; None for a dense model."""
        if not self.moe_layers:
            return None
        return RoutingSpec(num_moe_layers=len(self.moe_layers), top_k=self.top_k, num_experts=self.num_experts)


def read_model_config(path: Path) -> ModelConfig:
    """Read ``path``/config.json. Raises ModelError naming the folder or key, its value and the fix."""
    values = read_json(path)
    architecture = (values.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ModelError(
            f"model.path {path}: architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}"
        )
    refuse_quantized(path, values)
    return FAMILIES[architecture](architecture, _Fields(path, values))


def routing_spec(path: Path) -> RoutingSpec | None:
    """Return the layout of routed experts of the model in ``path``; None for a dense model."""
    return read_model_config(path).routing_spec


def check_run(config: RunConfig, model: ModelConfig) -> None:
    """Raise ModelError if the settings cannot work with this model. Checked before anything starts."""
    if config.trainer.router_replay != "off" and model.routing_spec is None:
        raise ModelError(
            f"trainer.router_replay is {config.trainer.router_replay}, but {config.model.path} "
            f"({model.architecture}) has no MoE layer, and so no routed experts to "
            "replay; set trainer.router_replay to off"
        )
    if config.rollout.data_parallel_size > 1 and model.routing_spec is None:
        raise ModelError(
            f"rollout.data_parallel_size is {config.rollout.data_parallel_size}, but {config.model.path} "
            f"({model.architecture}) has no experts to spread; set it to 1, and rollout.replicas to more engines"
        )
    stops = {"rollout": config.rollout.stop_token_ids}
    stops |= {f"data.sources.{name}": source.stop_token_ids for name, source in config.data.sources.items()}
    stops |= {f"eval.sets.{name}": each.stop_token_ids for name, each in config.eval.sets.items()}
    for key, tokens in stops.items():
        if unknown := [token for token in tokens if token >= model.vocab_size]:
            raise ModelError(
                f"{key}.stop_token_ids has {unknown[0]}, but {config.model.path} has {model.vocab_size} tokens, from "
                "0; remove it"
            )
    if "sglang" in config.rollout.engine_names:
        _check_sglang(config, model)
    _check_layout(config, model)
    longest = config.data.max_prompt_tokens + config.longest_response
    if longest > model.max_position_embeddings:
        raise ModelError(
            f"data.max_prompt_tokens ({config.data.max_prompt_tokens}) + {_longest_key(config)} "
            f"({config.longest_response}) is {longest}, above the {model.max_position_embeddings} "
            f"positions of {config.model.path} (max_position_embeddings); lower one of them"
        )


# Families whose output layer SGLang 0.5.23 makes apart from the embedding, whatever the checkpoint says.
_UNTIED_IN_SGLANG = ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "Glm4MoeForCausalLM")


def _check_sglang(config: RunConfig, model: ModelConfig) -> None:
    """Raise ModelError for what SGLang 0.5.23 computes otherwise than the trainer, or cannot start with."""
    if model.tie_word_embeddings and model.architecture in _UNTIED_IN_SGLANG:
        raise ModelError(
            f"rollout.engine is sglang, but tie_word_embeddings in {config.model.path}/config.json is true, and SGLang "
            f"leaves the output layer of {model.architecture} empty then; set rollout.engine to vllm"
        )
    if model.architecture == "MixtralForCausalLM" and model.head_dim * model.num_heads != model.hidden_size:
        raise ModelError(
            f"rollout.engine is sglang, but the attention heads of {config.model.path} have a size of their own "
            f"(head_dim {model.head_dim}), and SGLang takes hidden_size / num_attention_heads for Mixtral; set "
            "rollout.engine to vllm"
        )
    if model.architecture == "Qwen3MoeForCausalLM" and len(model.moe_layers) < model.num_layers:
        dense = next(layer for layer in range(model.num_layers) if layer not in model.moe_layers)
        raise ModelError(
            f"rollout.engine is sglang, but layer {dense} of {config.model.path} is dense (mlp_only_layers or "
            "decoder_sparse_step in config.json), and SGLang computes every layer of Qwen3-MoE as a mixture, with "
            "experts that it never read; set rollout.engine to vllm"
        )


def _longest_key(config: RunConfig) -> str:
    """Return the setting with the longest limit of responses."""
    if config.longest_response == config.rollout.max_response_tokens:
        return "rollout.max_response_tokens"
    limits = {name: each.max_response_tokens or 0 for name, each in config.eval.sets.items()}
    return f"eval.sets.{max(limits, key=limits.__getitem__)}.max_response_tokens"


def _check_layout(config: RunConfig, model: ModelConfig) -> None:
    """Raise ModelError unless trainer.parallel divides the model."""
    sizes = config.trainer.parallel
    _check_stages(config, model)
    divided = [
        ("tp", sizes.tp, "num_attention_heads", model.num_heads),
        ("tp", sizes.tp, "intermediate_size", model.intermediate_size),
        ("tp", sizes.tp, "vocab_size", model.vocab_size),
    ]
    if model.latent is None:
        divided.append(("tp", sizes.tp, "num_key_value_heads", model.num_kv_heads))
    if model.moe_layers:
        divided += [
            ("ep", sizes.ep, "the number of experts", model.num_experts),
            ("etp", sizes.etp, "moe_intermediate_size", model.moe_intermediate_size),
            ("tp", sizes.tp, "the shared experts' intermediate size", model.shared_intermediate_size),
        ]
    elif sizes.ep > 1 or sizes.etp > 1:
        raise ModelError(
            f"trainer.parallel.ep is {sizes.ep} and etp {sizes.etp}, but {config.model.path} ({model.architecture}) "
            "has no experts; set both to 1"
        )
    for key, size, what, count in divided:
        if count % size:
            raise ModelError(
                f"trainer.parallel.{key} is {size}, which does not divide {what} ({count}) of {config.model.path}; "
                f"possible are {', '.join(str(n) for n in range(1, count + 1) if count % n == 0 and n <= 64)}"
            )


def _check_stages(config: RunConfig, model: ModelConfig) -> None:
    """Raise ModelError unless each pipeline stage gets a layer, and each layer a stage."""
    sizes = config.trainer.parallel
    stages, counts = sizes.pp * sizes.vpp, sizes.layers_per_stage
    has = f"{config.model.path} has {model.num_layers} layers (num_hidden_layers)"
    if counts is not None and sum(counts) != model.num_layers:
        raise ModelError(
            f"trainer.parallel.layers_per_stage is {list(counts)}, {sum(counts)} layers together, but {has}; change "
            "the numbers, or set it to null"
        )
    if stages > model.num_layers:
        key = "pp x trainer.parallel.vpp" if sizes.vpp > 1 else "pp"
        raise ModelError(
            f"trainer.parallel.{key} is {stages}, but {has}, and each stage needs one; set it to {model.num_layers} at "
            "most"
        )
    unit = config.trainer.recompute_num_layers
    uniform = config.trainer.recompute == "full" and config.trainer.recompute_method == "uniform"
    if uniform and (uneven := [count for count in sizes.stage_layers(model.num_layers) if count % unit]):
        raise ModelError(
            f"trainer.recompute_num_layers is {unit}, which does not divide the {uneven[0]} layers of a pipeline stage "
            f"of {config.model.path}; set it to 1, or trainer.recompute_method to block"
        )


def checkpoint_shards(path: Path) -> list[Path]:
    """Return the *.safetensors files of a checkpoint folder. Raises ModelError naming those that are missing."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise ModelError(f"model.path {path}: {index.name} is not a safetensors index ({error})") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"model.path {path}: {index.name} lists {', '.join(missing[:5])}, but the folder has no such files; "
                "copy or download the checkpoint again"
            )
        return [path / name for name in names]
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"model.path {path}: no *.safetensors file; set it to a Hugging Face checkpoint folder")
    return shards


def check_not_quantized(path: Path) -> None:
    """Raise ModelError if the checkpoint in ``path`` is quantized, by its config.json or the types of its tensors.

    Reads the headers of its *.safetensors files, if it has such, and raises ModelError naming one that is damaged.
    """
    refuse_quantized(path, read_json(path))
    if any(path.glob("*.safetensors")):
        check_plain(path, read_headers(checkpoint_shards(path)))


class _Fields:
    """A config.json whose fields are read with errors that name folder and key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def error(self, what: str) -> ModelError:
        """Return the error for a fault in this config.json."""
        return ModelError(f"model.path {self.path}: config.json: {what}")

    def only(self, **wanted: Any) -> None:
        """Raise ModelError for values that the family allows but that this trainer would compute unlike the engine."""
        for key, value in wanted.items():
            found = self.values.get(key, value)
            if found != value:
                raise self.error(f"{key} is {found!r}; only {value!r} is supported")

    def positive(self, *names: str, default: int | None = None) -> int:
        """Return the first of ``names`` that is set. Raises ModelError unless it is a positive integer."""
        value = next((self.values[name] for name in names if self.values.get(name) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(f"{names[0]} is {value!r}, expected a positive integer")
        return value

    def not_negative(self, name: str) -> int:
        """Return a field that may be missing or 0."""
        return self.positive(name) if self.values.get(name) else 0

    def integers(self, name: str) -> list[int]:
        """Return a field that is a list of layers; [] if it is missing."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.error(f"{name} is {value!r}, expected a list of layers")
        return value

    def rope_theta(self) -> float:
        """Return the base of the rotary embeddings."""
        # 10000 is the default of transformers.
        return float(self._rope.get("rope_theta", self.values.get("rope_theta", 10000.0)))

    def plain_rope(self) -> None:
        """Raise ModelError for rotary embeddings of another kind than the ordinary one."""
        kind = self._rope_type
        if kind != "default":
            raise self.error(f"rope_type is {kind!r}; only 'default' is supported")

    def yarn(self) -> Yarn | None:
        """Return the stretching of rotary embeddings; None for ordinary ones."""
        if self._rope_type == "default":
            return None
        if self._rope_type != "yarn":
            raise self.error(f"rope_type is {self._rope_type!r}; only 'default' and 'yarn' are supported")
        rope = self._rope
        return Yarn(
            factor=float(rope["factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
            beta_fast=float(rope.get("beta_fast", 32)),
            beta_slow=float(rope.get("beta_slow", 1)),
            mscale=float(rope.get("mscale", 1.0)),
            mscale_all_dim=float(rope.get("mscale_all_dim", 0.0)),
        )

    @property
    def _rope(self) -> Mapping[str, Any]:
        """The rotary embeddings' fields: rope_parameters since transformers 5, rope_scaling and the top before."""
        return self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}

    @property
    def _rope_type(self) -> str:
        return str(self._rope.get("rope_type", self._rope.get("type", "default")))


# ---- the families ----


def _common(architecture: str, fields: _Fields) -> ModelConfig:
    """Read the fields that all families name alike."""
    fields.only(hidden_act="silu", use_sliding_window=False)
    heads = fields.positive("num_attention_heads")
    kv_heads = fields.positive("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise fields.error(f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=fields.positive("hidden_size"),
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=fields.positive("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        # Some families set the head size independently of hidden_size / heads; the quotient is only the default.
        head_dim=fields.positive("head_dim", default=fields.positive("hidden_size") // heads),
        rms_norm_eps=float(fields.values.get("rms_norm_eps", 1e-6)),
        rope_theta=fields.rope_theta(),
        max_position_embeddings=fields.positive("max_position_embeddings"),
        tie_word_embeddings=bool(fields.values.get("tie_word_embeddings", False)),
    )


def _llama(architecture: str, fields: _Fields) -> ModelConfig:
    fields.only(attention_bias=False, mlp_bias=False)
    fields.plain_rope()
    return _common(architecture, fields)


def _qwen3(architecture: str, fields: _Fields) -> ModelConfig:
    fields.only(attention_bias=False)
    fields.plain_rope()
    return replace(_common(architecture, fields), qk_norm=True)


def _qwen3_moe(architecture: str, fields: _Fields) -> ModelConfig:
    model = _qwen3(architecture, fields)
    dense = set(fields.integers("mlp_only_layers"))
    step = fields.positive("decoder_sparse_step", default=1)
    return replace(
        model,
        **_experts(fields),
        moe_layers=tuple(i for i in range(model.num_layers) if i not in dense and (i + 1) % step == 0),
        moe_intermediate_size=fields.positive("moe_intermediate_size"),
        norm_topk_prob=bool(fields.values.get("norm_topk_prob", False)),
    )


def _mixtral(architecture: str, fields: _Fields) -> ModelConfig:
    fields.only(sliding_window=None, attention_bias=False)
    fields.plain_rope()
    model = _common(architecture, fields)
    return replace(
        model,
        **_experts(fields),
        moe_layers=tuple(range(model.num_layers)),
        moe_intermediate_size=model.intermediate_size,
        norm_topk_prob=True,
    )


def _deepseek_v3(architecture: str, fields: _Fields) -> ModelConfig:
    fields.only(attention_bias=False)
    latent = LatentAttention(
        query_rank=None if fields.values.get("q_lora_rank") is None else fields.positive("q_lora_rank"),
        key_value_rank=fields.positive("kv_lora_rank"),
        plain_dim=fields.positive("qk_nope_head_dim"),
        rotary_dim=fields.positive("qk_rope_head_dim"),
        value_dim=fields.positive("v_head_dim"),
        yarn=fields.yarn(),
    )
    return replace(_sigmoid_routed(architecture, fields), latent=latent)


def _glm4_moe(architecture: str, fields: _Fields) -> ModelConfig:
    fields.plain_rope()
    model = _sigmoid_routed(architecture, fields)
    parameters = fields.values.get("rope_parameters") or {}
    return replace(
        model,
        qk_norm=bool(fields.values.get("use_qk_norm", False)),
        qkv_bias=bool(fields.values.get("attention_bias", False)),
        rotary_fraction=float(parameters.get("partial_rotary_factor", fields.values.get("partial_rotary_factor", 0.5))),
    )


def _sigmoid_routed(architecture: str, fields: _Fields) -> ModelConfig:
    """Experts as in DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, a bias for balance, groups, shared experts."""
    # Megatron always normalizes sigmoid scores.
    fields.only(norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    model = _common(architecture, fields)
    experts = _experts(fields)
    groups, group_top_k = fields.positive("n_group", default=1), fields.positive("topk_group", default=1)
    if groups > 1 and experts["top_k"] != 2 * group_top_k:
        # A group's score is the sum of its best two experts; Megatron sums the best top_k / topk_group.
        raise fields.error(
            f"num_experts_per_tok is {experts['top_k']} with topk_group {group_top_k}; "
            "only num_experts_per_tok = 2 x topk_group is supported"
        )
    intermediate = fields.positive("moe_intermediate_size")
    return replace(
        model,
        **experts,
        moe_layers=tuple(range(fields.not_negative("first_k_dense_replace"), model.num_layers)),
        moe_intermediate_size=intermediate,
        norm_topk_prob=True,
        score_function="sigmoid",
        expert_bias=True,
        num_groups=groups if groups > 1 else 0,
        group_top_k=group_top_k if groups > 1 else 0,
        scaling=float(fields.values.get("routed_scaling_factor", 1.0)),
        shared_intermediate_size=intermediate * fields.not_negative("n_shared_experts"),
        extra_layers=fields.not_negative("num_nextn_predict_layers"),
    )


def _experts(fields: _Fields) -> dict[str, Any]:
    # transformers 5 writes num_local_experts, earlier versions num_experts, DeepSeek n_routed_experts.
    experts = fields.positive("num_experts", "num_local_experts", "n_routed_experts")
    top_k = fields.positive("num_experts_per_tok")
    if top_k > experts:
        raise fields.error(f"num_experts_per_tok ({top_k}) exceeds num_experts ({experts})")
    return {"num_experts": experts, "top_k": top_k}


# {architecture: how its config.json is read}, for the architectures that the tables in models/names.py cover.
FAMILIES: dict[str, Callable[[str, _Fields], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MixtralForCausalLM": _mixtral,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "Glm4MoeForCausalLM": _glm4_moe,
}


def read_json(path: Path) -> dict[str, Any]:
    """Return ``path``/config.json as it is. Raises ModelError naming the folder and the fix."""
    if not path.is_dir():
        raise ModelError(f"model.path {path}: no such folder")
    file = path / "config.json"
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise ModelError(
            f"model.path {path}: config.json: {error.strerror}; set it to a Hugging Face checkpoint folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"model.path {path}: config.json is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"model.path {path}: config.json is a JSON {type(values).__name__}, expected an object")
    return values
