"""config.json of a checkpoint folder: what is read from it, and what is refused with which words."""

import json

import pytest

from async_rl.config.loading import validate
from async_rl.errors import ModelError
from async_rl.models.config import LatentAttention, Yarn, check_run, checkpoint_shards, read_model_config, routing_spec
from async_rl.models.names import ignored
from async_rl.types import RoutingSpec

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
}
DENSE = {**{k: v for k, v in MOE.items() if "expert" not in k}, "architectures": ["Qwen3ForCausalLM"]}


def folder(path, **changes):
    values = {**changes.pop("base", MOE), **changes}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "layer"), [({"mlp_only_layers": [2]}, 2), ({"decoder_sparse_step": 2}, 0), ({}, None)]
)
def test_sglang_is_refused_for_dense_layers_that_it_takes_for_mixtures(tmp_path, changes, layer):
    path = folder(tmp_path, max_position_embeddings=4096, **changes)
    model = read_model_config(path)
    tree = {"model": {"path": str(path)}, "data": {"train": "x"}, "rollout": {"engine": "sglang"}}
    if layer is None:
        check_run(validate(tree), model)
        return
    with pytest.raises(ModelError, match=f"engine is sglang, but layer {layer} of .* is dense .*set rollout.engine to"):
        check_run(validate(tree), model)
    check_run(validate(tree | {"rollout": {"engine": "vllm"}}), model)


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [("Qwen3MoeForCausalLM", True), ("MixtralForCausalLM", True), ("Qwen3ForCausalLM", False)],
)
def test_sglang_is_refused_for_mixtures_with_tied_embeddings(tmp_path, architecture, refused):
    changes = {"architectures": [architecture], "num_local_experts": 8, "head_dim": 8, "tie_word_embeddings": True}
    path = folder(tmp_path, max_position_embeddings=4096, **changes)
    replay = {} if refused else {"trainer": {"router_replay": "off"}}
    tree = {"model": {"path": str(path)}, "data": {"train": "x"}, "rollout": {"engine": "sglang"}, **replay}
    if not refused:
        check_run(validate(tree), read_model_config(path))
        return
    with pytest.raises(ModelError, match=r"tie_word_embeddings in .* is true, and SGLang leaves the output layer"):
        check_run(validate(tree), read_model_config(path))
    check_run(validate(tree | {"rollout": {"engine": "vllm"}}), read_model_config(path))


@pytest.mark.parametrize(("head_dim", "refused"), [(8, False), (16, True)])
def test_sglang_is_refused_for_a_mixtral_whose_heads_have_a_size_of_their_own(tmp_path, head_dim, refused):
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "head_dim": head_dim}
    path = folder(tmp_path, max_position_embeddings=4096, **mixtral)
    tree = {"model": {"path": str(path)}, "data": {"train": "x"}, "rollout": {"engine": "sglang"}}
    if not refused:
        check_run(validate(tree), read_model_config(path))
        return
    with pytest.raises(ModelError, match=r"heads of .* have a size of their own \(head_dim 16\)"):
        check_run(validate(tree), read_model_config(path))


def test_the_longest_limit_of_an_evaluation_must_fit_the_model_too(tmp_path):
    path = folder(tmp_path, max_position_embeddings=2048)
    tree = {"model": {"path": str(path)}, "data": {"train": "x"}}
    sets = {"aime": {"path": "a", "max_response_tokens": 1536}, "math": {"path": "b", "max_response_tokens": 8}}
    check_run(validate(tree | {"eval": {"sets": sets}}), read_model_config(path))
    sets["aime"]["max_response_tokens"] = 1537
    with pytest.raises(ModelError, match=r"eval.sets.aime.max_response_tokens \(1537\) is 2049, above the 2048"):
        check_run(validate(tree | {"eval": {"sets": sets}}), read_model_config(path))


def run_config(path, **trainer):
    return validate({"model": {"path": str(path)}, "data": {"train": "x"}, "trainer": trainer})


def test_reads_a_moe_and_a_dense_model(tmp_path):
    model = read_model_config(folder(tmp_path / "moe"))
    assert (model.num_experts, model.top_k, model.moe_layers) == (8, 2, (0, 1, 2, 3))
    assert model.rope_theta == 1e6
    assert routing_spec(tmp_path / "moe") == RoutingSpec(num_moe_layers=4, top_k=2, num_experts=8)
    dense = read_model_config(folder(tmp_path / "dense", base=DENSE))
    assert (dense.num_experts, dense.moe_layers, dense.routing_spec) == (0, (), None)


def test_reads_both_spellings_of_transformers_4_and_5(tmp_path):
    old = read_model_config(folder(tmp_path / "4"))
    new = read_model_config(
        folder(
            tmp_path / "5",
            num_experts=None,
            num_local_experts=8,
            rope_theta=None,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        )
    )
    assert old == new


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"mlp_only_layers": [0, 2]}, (1, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3,)),
    ],
)
def test_dense_layers_of_a_moe_model_are_no_moe_layers(tmp_path, changes, layers):
    assert read_model_config(folder(tmp_path, **changes)).moe_layers == layers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            ["GemmaForCausalLM", "LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"],
        ),
        ({"architectures": None}, ["none", "supported are"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok (9)", "num_experts (8)"]),
        ({"mlp_only_layers": "0"}, ["mlp_only_layers", "'0'"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_type", "'yarn'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "'linear'"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, ["mlp_bias", "True"]),
        (
            {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            ["rope_type", "'llama3'"],
        ),
    ],
)
def test_refuses_what_it_cannot_train_and_names_it(tmp_path, changes, words):
    with pytest.raises(ModelError) as error:
        read_model_config(folder(tmp_path, **changes))
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_refuses_a_missing_folder_a_missing_config_and_a_broken_one(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: No such file"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected an object"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_replay_on_a_dense_model_is_refused(tmp_path, mode):
    path = folder(tmp_path, base=DENSE, max_position_embeddings=4096)
    with pytest.raises(ModelError, match=f"router_replay is {mode}.*set trainer.router_replay to off"):
        check_run(run_config(path, router_replay=mode), read_model_config(path))
    check_run(run_config(path, router_replay="off"), read_model_config(path))


def test_sequences_longer_than_the_model_are_refused(tmp_path):
    path = folder(tmp_path, max_position_embeddings=1535)
    with pytest.raises(
        ModelError, match=r"max_prompt_tokens \(512\).*max_response_tokens \(1024\) is 1536, above the 1535"
    ):
        check_run(run_config(path), read_model_config(path))
    folder(tmp_path, max_position_embeddings=1536)
    check_run(run_config(path), read_model_config(path))


def test_a_stop_token_that_the_model_does_not_have_is_refused(tmp_path):
    path = folder(tmp_path, max_position_embeddings=4096)
    model = read_model_config(path)
    tree = {"model": {"path": str(path)}, "data": {"train": "x"}}
    check_run(validate({**tree, "rollout": {"stop_token_ids": [model.vocab_size - 1]}}), model)
    with pytest.raises(ModelError, match=f"rollout.stop_token_ids has {model.vocab_size}, but"):
        check_run(validate({**tree, "rollout": {"stop_token_ids": [model.vocab_size]}}), model)


def test_shards_are_those_of_the_index_and_all_must_be_there(tmp_path):
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        checkpoint_shards(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert [p.name for p in checkpoint_shards(tmp_path)] == ["model.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (tmp_path / "1.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"lists 2\.safetensors, but the folder has no such"):
        checkpoint_shards(tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"")
    assert [p.name for p in checkpoint_shards(tmp_path)] == ["1.safetensors", "2.safetensors"]
    index.write_text("{}")
    with pytest.raises(ModelError, match="is not a safetensors index"):
        checkpoint_shards(tmp_path)


# As published, sizes apart: keys that transformers 5 would not write, and none of those that it would add.
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 163840,
}
DEEPSEEK_V3 = MOONLIGHT | {
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}


def test_reads_moonlight_and_deepseek_v3(tmp_path):
    moonlight = read_model_config(folder(tmp_path / "moonlight", base=MOONLIGHT))
    assert moonlight.latent == LatentAttention(None, 512, 128, 64, 128, None)
    assert moonlight.moe_layers == tuple(range(1, 27))
    assert (moonlight.score_function, moonlight.expert_bias, moonlight.scaling) == ("sigmoid", True, 2.446)
    assert (moonlight.num_groups, moonlight.group_top_k, moonlight.shared_intermediate_size) == (0, 0, 2816)
    assert moonlight.routing_spec == RoutingSpec(num_moe_layers=26, top_k=6, num_experts=64)
    deepseek = read_model_config(folder(tmp_path / "deepseek", base=DEEPSEEK_V3))
    assert deepseek.latent == LatentAttention(1536, 512, 128, 64, 128, Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0))
    assert (deepseek.num_groups, deepseek.group_top_k, deepseek.extra_layers) == (8, 4, 1)
    assert ignored(deepseek, "model.layers.27.mlp.gate.weight"), "a layer that predicts further tokens is not built"
    assert not ignored(deepseek, "model.layers.26.mlp.gate.weight")
    assert not ignored(moonlight, "model.layers.27.mlp.gate.weight")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 6, "n_group": 8, "topk_group": 4}, ["num_experts_per_tok is 6", "topk_group 4"]),
        ({"norm_topk_prob": False}, ["norm_topk_prob is False"]),
        ({"scoring_func": "softmax"}, ["scoring_func is 'softmax'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "'yarn'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "quant_method is 'awq'"]),
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "MixtralForCausalLM", "Glm4MoeForCausalLM"]),
    ],
)
def test_refuses_what_it_would_compute_otherwise(tmp_path, changes, words):
    with pytest.raises(ModelError) as caught:
        read_model_config(folder(tmp_path / "model", base=MOONLIGHT | changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "changes", "words"),
    [
        ({"tp": 8}, {}, ["trainer.parallel.tp is 8", "num_attention_heads (4)", "possible are 1, 2, 4"]),
        ({"tp": 4}, {}, ["trainer.parallel.tp is 4", "num_key_value_heads (2)", "possible are 1, 2"]),
        ({"tp": 2}, {"vocab_size": 63}, ["trainer.parallel.tp is 2", "vocab_size (63)"]),
        ({"dp": 3, "ep": 3}, {}, ["trainer.parallel.ep is 3", "number of experts (8)"]),
        ({"dp": 5, "etp": 5}, {}, ["trainer.parallel.etp is 5", "moe_intermediate_size (24)"]),
        ({"pp": 5}, {}, ["trainer.parallel.pp is 5", "4 layers (num_hidden_layers)", "set it to 4 at most"]),
        ({"pp": 2, "vpp": 4}, {}, ["trainer.parallel.pp x trainer.parallel.vpp is 8", "4 layers (num_hidden_layers)"]),
        ({"pp": 2, "layers_per_stage": [2, 3]}, {}, ["layers_per_stage is [2, 3], 5 layers together", "has 4 layers"]),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(tmp_path, sizes, changes, words):
    path = folder(tmp_path / "model", **changes)
    with pytest.raises(ModelError) as caught:
        check_run(run_config(path, parallel=sizes), read_model_config(path))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("sizes", [{"pp": 3}, {"pp": 2, "layers_per_stage": [1, 3]}])
def test_stages_may_have_different_numbers_of_layers(tmp_path, sizes):
    path = folder(tmp_path / "model", max_position_embeddings=2048)
    check_run(run_config(path, parallel=sizes), read_model_config(path))


def test_experts_cannot_be_spread_where_there_are_none(tmp_path):
    path = folder(tmp_path / "model", base=DENSE)
    with pytest.raises(ModelError, match=r"trainer\.parallel\.ep is 2 .* has no experts"):
        check_run(run_config(path, parallel={"dp": 2, "ep": 2}, router_replay="off"), read_model_config(path))
    tree = {"model": {"path": str(path)}, "data": {"train": "x"}, "trainer": {"router_replay": "off"}}
    with pytest.raises(ModelError, match=r"rollout\.data_parallel_size is 2, .* has no experts .* set it to 1"):
        check_run(validate(tree | {"rollout": {"data_parallel_size": 2}}), read_model_config(path))


def test_latent_attention_has_no_key_value_heads_to_divide(tmp_path):
    path = folder(tmp_path / "model", base=MOONLIGHT | {"num_key_value_heads": 1})
    check_run(run_config(path, parallel={"tp": 16}), read_model_config(path))
