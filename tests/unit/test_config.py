"""The settings tree: what it refuses and how it says so, what it takes and means."""

from pathlib import Path

import pytest
import yaml

import async_rl
from async_rl.config import reference
from async_rl.config.loading import default_of, leaves, load, parse_overrides, to_yaml, validate
from async_rl.config.paths import absolute
from async_rl.config.schema import RunConfig
from async_rl.errors import ConfigError

MINIMAL = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}}


def tree(**sections):
    return {**MINIMAL, **sections}


def refusal(**sections) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(tree(**sections))
    return str(caught.value)


def refused_words(*words) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(words)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_minimal_tree_takes_the_documented_defaults():
    config = validate(MINIMAL)
    assert config.async_training.staleness_threshold == 0.5
    assert config.async_training.max_staleness == 4
    assert config.async_training.on_stale == "mask"
    assert config.async_training.partial_rollout.mode == "resume"
    assert config.trainer.router_replay == "R3"
    assert config.rollout.n == 8
    assert config.queue.max_bytes == 2 * 2**30
    assert config.run_dir == Path("runs/run")


def test_every_setting_has_a_sentence_and_a_default():
    found = dict(leaves())
    assert len(found) > 60
    assert [key for key, sentence in found.items() if not sentence.endswith(".")] == []
    required = [key for key in found if default_of(key) == "required"]
    assert required == ["model.path"], "data.train may be data.sources"
    assert default_of("queue.max_groups") == "null"
    assert default_of("data.shuffle") == "true"
    assert default_of("metrics.loggers") == "[]"
    assert default_of("trainer.recompute_modules") == "[core_attn]"


def test_unknown_key_names_the_near_ones():
    message = refusal(async_training={"max_stalness": 2})
    assert message.startswith("async_training.max_stalness: no such setting")
    assert "async_training.max_staleness" in message


def test_key_without_its_section_is_pointed_to_the_full_name():
    assert "async_training.max_staleness" in refused_words("--max_staleness", "2")


def test_section_given_a_value_names_settings_of_that_section():
    assert "trainer." in refused_words("--trainer", "2")


def test_every_fault_has_its_line():
    message = refusal(rollout={"n": 0, "replicas": 0}, trainer={"router_replay": "R4"})
    assert len(message.splitlines()) == 3
    assert "rollout.n: 0 is not valid" in message
    assert "trainer.router_replay: 'R4' is not valid: must be one of R3, R2, off" in message


def test_missing_required_key():
    with pytest.raises(ConfigError, match=r"model\.path: required"):
        validate({"model": {}, "data": {"train": "x"}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("trainer", "steps", 0),
        ("trainer", "steps", True),
        ("trainer", "steps", "3"),
        ("trainer", "steps", 2.5),
        ("rollout", "temperature", 0.0),
        ("rollout", "temperature", float("inf")),
        ("rollout", "temperature", float("nan")),
        ("rollout", "top_p", 1.5),
        ("data", "shuffle", "yes"),
        ("metrics", "port", 65536),
        ("reward", "function", "no_colon"),
        ("async_training", "on_stale", "drops"),
    ],
)
def test_wrong_value_names_key_and_value(section, key, value):
    message = refusal(**{section: {**MINIMAL.get(section, {}), key: value}})
    assert message.startswith(f"{section}.{key}: {value!r} is not valid")


def test_literal_names_the_nearest_choice():
    assert "did you mean drop?" in refusal(async_training={"on_stale": "drops"})


def test_a_number_of_replicas_stays_a_number():
    config = validate(tree(rollout={"replicas": 4}))
    assert config.rollout.replicas == 4
    assert not config.rollout.elastic
    assert (config.rollout.replica_range.min, config.rollout.replica_range.max) == (4, 4)
    assert "\n  replicas: 4\n" in to_yaml(config)


def test_replicas_may_come_and_go_between_two_numbers(tmp_path):
    path = write(tmp_path, "model: {path: m}\ndata: {train: t}\nrollout:\n  replicas: {min: 2, max: 8}\n")
    config = load(path)
    assert config.rollout.elastic
    assert (config.rollout.replica_range.min, config.rollout.replica_range.max) == (2, 8)
    written = write(tmp_path, to_yaml(config))
    assert load(written) == config
    assert load(path, parse_overrides(["--rollout.replicas", "4"])).rollout.replicas == 4
    assert load(path, parse_overrides(["--rollout.replicas.max=16"])).rollout.replica_range.max == 16


def test_a_number_of_replicas_in_the_file_gives_way_to_two_on_the_command_line(tmp_path):
    path = write(tmp_path, "model: {path: m}\ndata: {train: t}\nrollout: {replicas: 4}\n")
    words = ["--rollout.replicas.min", "2", "--rollout.replicas.max", "8"]
    assert load(path, parse_overrides(words)).rollout.replica_range.max == 8
    assert load(path, parse_overrides(["--rollout.replicas", "{min: 2, max: 8}"])).rollout.elastic
    with pytest.raises(ConfigError, match=r"^rollout\.replicas\.max: required, but missing$"):
        load(path, parse_overrides(words[:2]))


@pytest.mark.parametrize(
    ("replicas", "says"),
    [
        (0, "rollout.replicas: 0 is not valid: input should be greater than 0"),
        ("four", "rollout.replicas: 'four' is not valid: input should be a valid integer"),
        ({"min": 0, "max": 8}, "rollout.replicas.min: 0 is not valid: input should be greater than 0"),
        ({"min": 2}, "rollout.replicas.max: required, but missing"),
        ({"min": 2, "max": 8, "most": 9}, "rollout.replicas.most: no such setting; did you mean rollout.replicas"),
        ({"min": 9, "max": 8}, "rollout.replicas.min is 9, more than rollout.replicas.max (8); set min to 8 at most"),
    ],
)
def test_replicas_that_cannot_be_are_one_line(replicas, says):
    assert refusal(rollout={"replicas": replicas}).startswith(says)
    assert "\n" not in refusal(rollout={"replicas": replicas})


def test_a_word_below_a_setting_that_is_no_section_is_unknown():
    assert "rollout.n.min: no such setting" in refused_words("--rollout.n.min", "2")
    assert "rollout.replicas.most: no such setting" in refused_words("--rollout.replicas.most", "2")


def test_the_reference_shows_both_forms_of_replicas():
    assert "| integer > 0 or {`min`: integer > 0, `max`: integer > 0} | `1` |" in reference.page().replace("&gt;", ">")


def test_a_setting_that_takes_a_number_or_a_word_is_named_without_their_types():
    lines = refusal(sync={"canary_tolerance": "aut"}).splitlines()
    assert [line.partition(": 'aut' is not valid: ")[0] for line in lines] == ["sync.canary_tolerance"] * 2
    assert lines[1].endswith("input should be 'auto'")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_run_name_cannot_leave_its_folder(name):
    assert "name" in refusal(name=name)


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"queue": {"max_groups": 3}}, ["queue.max_groups", "trainer.groups_per_step"]),
        ({"queue": {"copies": 2, "backend": "redis"}}, ["queue.copies is 2", "queue.backend is redis"]),
        ({"queue": {"copies": 3}}, ["queue.copies", "3", "2"]),
        ({"queue": {"copies": 0}}, ["queue.copies", "0", "1"]),
        ({"trainer": {"parallel": {"dp": 3, "ep": 2}}}, ["trainer.parallel", "ep x etp is 2", "(3)"]),
        ({"trainer": {"parallel": {"vpp": 2}}}, ["trainer.parallel.vpp", "pp is 1"]),
        ({"trainer": {"parallel": {"pp": 2, "layers_per_stage": [3]}}}, ["layers_per_stage has 1", "2 stages"]),
        (
            {"rollout": {"max_num_seqs": 64, "max_trajectories": 32}},
            ["rollout.max_trajectories is 32", "max_num_seqs"],
        ),
        (
            {"rollout": {"max_num_seqs": 64, "max_num_batched_tokens": 32}},
            ["max_num_batched_tokens", "max_num_seqs"],
        ),
        # Measured on random logits at 0.95: every ratio is 0.951 on average although nothing is stale.
        ({"rollout": {"top_k": 20}}, ["rollout.top_k is 20", "set rollout.top_k to 0"]),
        ({"rollout": {"min_p": 0.1}}, ["rollout.min_p is 0.1", "set rollout.min_p to 0.0"]),
        ({"rollout": {"repetition_penalty": 1.1}}, ["rollout.repetition_penalty is 1.1", "to 1.0"]),
        ({"rollout": {"presence_penalty": 0.5}}, ["rollout.presence_penalty is 0.5", "to 0.0"]),
        ({"rollout": {"frequency_penalty": 0.5}}, ["rollout.frequency_penalty is 0.5", "to 0.0"]),
        ({"rollout": {"min_tokens": 4}}, ["rollout.min_tokens is 4", "set rollout.min_tokens to 0", "reward"]),
        ({"rollout": {"stop": ["a\N{REPLACEMENT CHARACTER}"]}}, ["rollout.stop", "U+FFFD"]),
        ({"rollout": {"top_p": 0.95}}, ["rollout.top_p is 0.95", "set rollout.top_p to 1", "rollout.temperature"]),
        ({"sync": {"backend": "nccl"}, "resources": {"device": "cpu"}}, ["sync.backend", "resources.device"]),
        (
            {"model": {"path": "m", "dtype": "float32"}, "rollout": {"quantization": "fp8_per_block"}},
            ["rollout.quantization is fp8_per_block", "float32 (model.dtype)", "set rollout.dtype to bfloat16"],
        ),
        (
            {"rollout": {"kv_cache_dtype": "fp8", "dtype": "float32"}},
            ["rollout.kv_cache_dtype is fp8", "float32 (rollout.dtype)", "set rollout.dtype to bfloat16"],
        ),
        (
            {"rollout": {"engine": "sglang", "quantization": "fp8_per_block"}},
            ["rollout.quantization is fp8_per_block", "rollout.engine has sglang", "have vllm alone"],
        ),
        (
            {"rollout": {"engines": ["vllm", "sglang"], "replicas": 2, "kv_cache_dtype": "fp8"}},
            ["rollout.kv_cache_dtype is fp8", "rollout.engines has sglang"],
        ),
        (
            {"rollout": {"quantization": "fp8_per_tensor"}, "resources": {"device": "cpu"}},
            ["rollout.quantization is fp8_per_tensor, which works on GPUs alone", "set it to fp8_per_channel"],
        ),
        (
            {"rollout": {"tensor_parallel_size": 6, "hosts_per_engine": 4}},
            ["rollout.tensor_parallel_size is 6", "4 hosts (rollout.hosts_per_engine) cannot share"],
        ),
        (
            {"rollout": {"engine": "sglang", "tensor_parallel_size": 2, "hosts_per_engine": 2}},
            ["rollout.hosts_per_engine is 2", "rollout.engine has sglang", "only vllm spans hosts"],
        ),
        (
            {"rollout": {"tensor_parallel_size": 2, "hosts_per_engine": 2}, "sync": {"backend": "shm"}},
            ["rollout.hosts_per_engine is 2", "sync.backend is shm", "set it to auto"],
        ),
        (
            {"rollout": {"engines": ["vllm", "sglang"], "replicas": 2, "data_parallel_size": 2}},
            ["rollout.data_parallel_size is 2", "rollout.engines has vllm, sglang", "only vllm"],
        ),
        (
            {"rollout": {"tensor_parallel_size": 2, "data_parallel_size": 2, "hosts_per_engine": 2}},
            ["rollout.data_parallel_size is 2", "rollout.hosts_per_engine is 2", "set one of them to 1"],
        ),
        ({"rollout": {"data_parallel_size": 9}}, ["rollout.data_parallel_size", "less than or equal to 8"]),
        (
            {"rollout": {"engine_args": {"enable_expert_parallel": True}}, "resources": {"device": "cpu"}},
            ["rollout.engine_args.enable_expert_parallel is True, which works on GPUs alone"],
        ),
        (
            {"rollout": {"sglang": {"python": "/venv/bin/python"}}},
            ["rollout.sglang.python is /venv/bin/python", "the engine is vllm"],
        ),
        (
            {
                "sync": {"backend": "nccl"},
                "resources": {"device": "cuda"},
                "rollout": {"engines": ["vllm", "sglang"], "replicas": 2},
            },
            ["sync.backend is nccl", "rollout.engines is ['vllm', 'sglang']", "have one engine"],
        ),
        (
            {"rollout": {"engine": "sglang", "engines": ["vllm", "sglang"], "replicas": 2}},
            ["rollout.engine is sglang", "rollout.engines", "remove one of them"],
        ),
        (
            {"rollout": {"engines": ["vllm", "sglang"]}},
            ["names 2 engines", "starts with 1 replicas", "rollout.replicas to at least 2"],
        ),
        (
            {"sync": {"backend": "nccl", "rolling": True}, "resources": {"device": "cuda"}},
            ["sync.rolling", "sync.backend is nccl"],
        ),
        (
            {"sync": {"backend": "object_store", "senders": "stages"}},
            ["sync.senders is stages", "sync.backend is object_store"],
        ),
        (
            {"sync": {"backend": "nccl", "delta": {"full_every": 20}}, "resources": {"device": "cuda"}},
            ["sync.delta.full_every is 20", "sync.backend is nccl", "to auto or object_store"],
        ),
        (
            {"sync": {"backend": "shm", "delta": {"full_every": 2}}},
            ["sync.delta.full_every is 2", "sync.backend is shm"],
        ),
        ({"data": {"train": "same.jsonl", "eval": "same.jsonl"}}, ["data.eval", "data.train"]),
        ({"cluster": {"local_dir": "/scratch"}}, ["cluster.local_dir", "cluster.shared_fs"]),
    ],
)
def test_combinations_that_cannot_work(sections, keys):
    message = refusal(**sections)
    assert all(key in message for key in keys)


def test_queue_bound_counts_all_mini_batches_of_a_step():
    sections = {"trainer": {"groups_per_step": 4}, "queue": {"max_groups": 7}}
    assert validate(tree(**sections)).required_groups == 4
    assert "needs 8 groups" in refusal(**sections, async_training={"require_batches": 2})


def test_tree_cannot_be_changed():
    config = validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_overrides_are_typed_by_their_setting():
    words = "--trainer.steps 7 --trainer.optimizer.lr=1e-4 --name 7 --model.path=123 --data.eval null"
    words += " --trainer.router_replay off --data.shuffle false"
    overrides = parse_overrides(words.split())
    assert overrides == {
        "trainer.steps": 7,
        "trainer.optimizer.lr": 1e-4,
        "name": "7",
        "model.path": "123",
        "data.eval": None,
        "trainer.router_replay": "off",
        "data.shuffle": False,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "1e5"), ("name", "true"), ("data.prompt_field", "true"), ("data.prompt_field", "1e5"), ("name", "0x10")],
)
def test_text_stays_the_text_that_was_written(key, value):
    assert parse_overrides([f"--{key}", value]) == {key: value}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--trainer.steps"], "--trainer.steps has no value"),
        (["--trainer.steps", "--seed", "1"], "--trainer.steps has no value"),
        (["--trainer.stpes", "1"], "did you mean trainer.steps"),
        (["--"], "unexpected argument"),
    ],
)
def test_mistyped_overrides(words, part):
    assert part in refused_words(*words)


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "model: {path: m}\ndata: {train: t}\ntrainer: {steps: 3, groups_per_step: 2}\n")
    config = load(path, {"trainer.steps": 5, "rollout.n": 4})
    assert (config.trainer.steps, config.trainer.groups_per_step, config.rollout.n) == (5, 2, 4)


def test_files_are_laid_over_one_another_setting_by_setting(tmp_path):
    texts = {
        "base": "model: {path: m}\ndata: {train: t}\n"
        "trainer: {steps: 3, loss: {clip_low: 0.1}}\nrollout: {replicas: 2}",
        "over": "trainer: {loss: {clip_high: 0.3}}\nrollout: {replicas: {min: 1, max: 4}}",
    }
    base, over = (tmp_path / f"{name}.yaml" for name in texts)
    for path, text in zip((base, over), texts.values(), strict=True):
        path.write_text(text)
    config = load([base, over], {"trainer.loss.clip_low": 0.2})
    assert (config.trainer.steps, config.trainer.loss.clip_low, config.trainer.loss.clip_high) == (3, 0.2, 0.3)
    assert (config.rollout.replicas.min, config.rollout.replicas.max) == (1, 4)
    assert load([over, base]).rollout.replicas == 2, "the last one wins"
    assert load([base]) == load(base)


def test_a_section_that_stands_in_two_places_of_a_file_is_changed_in_one(tmp_path):
    base, over = tmp_path / "base.yaml", tmp_path / "over.yaml"
    base.write_text("model: {path: m}\ndata: {train: t}\ncheckpoint: &same {every: 5}\neval: *same")
    over.write_text("eval: {every: 7}")
    config = load([base, over])
    assert (config.checkpoint.every, config.eval.every) == (5, 7)
    base.write_text("model: &a {b: *a}")
    with pytest.raises(ConfigError, match=r"base\.yaml: it is nested too deeply"):
        load([base, base])


def test_each_of_several_files_is_named_if_it_cannot_be_read(tmp_path):
    base, over = tmp_path / "base.yaml", tmp_path / "over.yaml"
    base.write_text("model: {path: m}\ndata: {train: t}")
    over.write_text("- a\n")
    with pytest.raises(ConfigError, match=r"over\.yaml: expected a mapping of keys, got list"):
        load([base, over])
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load([base, tmp_path / "none.yaml"])


def test_override_below_something_that_is_no_section(tmp_path):
    path = write(tmp_path, "model: {path: m}\ndata: {train: t}\ntrainer: 3\n")
    with pytest.raises(ConfigError, match=r"trainer\.steps: trainer is 3 in the file, not a section"):
        load(path, {"trainer.steps": 5})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [", "is not YAML"),
        ("", "expected a mapping of keys, got NoneType"),
        ("- a\n- b\n", "expected a mapping of keys, got list"),
        ("seed: 1\nseed: 2\n", "duplicate key 'seed'"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_files_that_are_not_settings(tmp_path, text, part):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load(tmp_path / "absent.yaml")


def test_yaml_reads_numbers_and_words_as_people_mean_them(tmp_path):
    text = "model: {path: m}\ndata: {train: t}\n"
    text += "trainer: {router_replay: off, optimizer: {lr: 1e-4, weight_decay: 0}}\n"
    config = load(write(tmp_path, text))
    assert config.trainer.router_replay == "off"
    assert config.trainer.optimizer.lr == 1e-4
    assert config.trainer.optimizer.weight_decay == 0.0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rollout": {"return_routed_experts": False}}, "R3, which replays the experts that the engine chose, but"),
        ({"trainer": {"router_fusion": True}}, "the fused router ignores"),
        ({"trainer": {"router_fusion": True, "router_replay": "R2"}}, "router_replay is R2, but"),
        (
            {"trainer": {"router_replay": "R2"}, "async_training": {"partial_rollout": {"routing": "exact"}}},
            "routing is exact, but trainer.router_replay is R2",
        ),
        (
            {"async_training": {"partial_rollout": {"routing": "exact", "mode": "in_flight"}}},
            "routing is exact, but its mode is in_flight",
        ),
    ],
)
def test_replay_that_would_do_nothing_is_refused(settings, part):
    with pytest.raises(ConfigError) as caught:
        validate(tree(**settings))
    assert part in str(caught.value)
    assert "set " in str(caught.value), "the message says what to change"


@pytest.mark.parametrize("value", ["2001-01-01", ".nan", "{1: a}", "!!set {a}", "!!binary gA==", "&a {b: *a}"])
@pytest.mark.parametrize("key", ["data.template_kwargs", "reward.arguments", "reward.functions.f.arguments"])
def test_arguments_that_the_run_folder_would_change_are_refused(tmp_path, key, value):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    words = ["--reward.functions.f.function", "my:f"] if "functions" in key else []
    with pytest.raises(ConfigError) as caught:
        load(path, parse_overrides([*words, f"--{key}", f"{{a: {value}}}"]))
    assert key in str(caught.value)
    assert "values must be those of JSON" in str(caught.value)


def test_replay_settings_that_make_sense_are_not_refused():
    off = {"router_replay": "off", "router_fusion": True}
    validate(tree(trainer=off, rollout={"return_routed_experts": False}))
    validate(tree(trainer={"router_replay": "R2"}, rollout={"return_routed_experts": False}))
    validate(tree(async_training={"partial_rollout": {"routing": "exact", "mode": "drain"}}))


def test_replicas_have_the_engines_in_turn():
    rollout = validate(tree(rollout={"engines": ["vllm", "vllm", "sglang"], "replicas": 4})).rollout
    assert [rollout.engine_of(replica) for replica in range(4)] == ["vllm", "vllm", "sglang", "vllm"]
    assert rollout.engine_names == ("vllm", "sglang")
    alone = validate(tree(rollout={"engine": "sglang", "replicas": 2})).rollout
    assert [alone.engine_of(0), alone.engine_of(1), *alone.engine_names] == ["sglang"] * 3


def test_the_engine_has_the_trainers_dtype_unless_told_otherwise():
    assert validate(tree()).engine_dtype == "bfloat16"
    assert validate(tree(model={"path": "m", "dtype": "float32"})).engine_dtype == "float32"
    mixed = validate(tree(model={"path": "m", "dtype": "float32"}, rollout={"dtype": "bfloat16"}))
    assert (mixed.engine_dtype, mixed.model.dtype) == ("bfloat16", "float32")


def test_resolved_tree_reloads_to_itself(tmp_path):
    config = validate(
        tree(
            trainer={"router_replay": "off", "optimizer": {"lr": 3e-5}},
            queue={"max_groups": 99},
            name="1e5",
            data={"train": "t", "eval": "e"},
        )
    )
    assert load(write(tmp_path, to_yaml(config))) == config
    assert isinstance(config, RunConfig)


def test_the_settings_reference_is_fresh():
    page = Path(async_rl.__file__).parents[1] / "docs" / "reference" / "settings.md"
    assert page.read_text() == reference.page(), "run make generate"


def test_the_settings_reference_has_every_setting_with_its_values():
    page = reference.page()
    for key, _ in leaves():
        assert f"| `{key}` | " in page
    assert "| `rollout.n` | integer > 0 | `8` | Responses per prompt" in page
    assert "| `queue.max_groups` | integer > 0 or `null` | `null` |" in page
    assert "| `trainer.loss.policy` | `ppo`, `gspo`, `cispo`, `dppo`, `ipo`, `reinforce` or `module:function` |" in page
    assert "| `metrics.loggers` | list of `tensorboard`, `wandb` | `[]` |" in page
    assert "| `prepare` | `module:function` or `null` | `null` |" in page
    assert "| `model.path` | path | required |" in page
    assert "its folder is &lt;runs>/&lt;name>" in page


def test_an_integer_may_be_written_with_an_exponent(tmp_path):
    assert parse_overrides(["--trainer.steps", "1e2"]) == {"trainer.steps": 100.0}
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "trainer": {"steps": 1e2}, "queue": {"max_groups": 1e3}}
    config = validate(tree)
    assert (config.trainer.steps, config.queue.max_groups) == (100, 1000)
    assert isinstance(config.trainer.steps, int)
    with pytest.raises(ConfigError, match=r"trainer\.steps: 1\.5 is not valid"):
        validate(tree | {"trainer": {"steps": 1.5}})


def test_a_dataset_is_a_file_a_pattern_or_a_list_of_them():
    words = ["--data.train", "7", "--data.eval", "[a.jsonl, b.parquet]", "--data.template_kwargs", "{depth: 1}"]
    lists = [
        "--rollout.engines",
        "[vllm, my:Engine]",
        "--rollout.stop=['</a>', '7']",
        "--rollout.stop_token_ids",
        "[7]",
    ]
    assert parse_overrides(lists) == {
        "rollout.engines": ["vllm", "my:Engine"],
        "rollout.stop": ["</a>", "7"],
        "rollout.stop_token_ids": [7],
    }
    overrides = parse_overrides(words)
    assert overrides == {
        "data.train": "7",
        "data.eval": ["a.jsonl", "b.parquet"],
        "data.template_kwargs": {"depth": 1},
    }
    assert parse_overrides(["--data.train", "*.parquet"]) == {"data.train": "*.parquet"}
    config = validate(tree(data={"train": "data/*.jsonl", "eval": ["a.jsonl", "b.parquet"]}))
    assert (config.data.train, config.data.eval) == (Path("data/*.jsonl"), [Path("a.jsonl"), Path("b.parquet")])
    assert validate(yaml.safe_load(to_yaml(config))) == config
    assert absolute(config).data.eval == [Path("a.jsonl").absolute(), Path("b.parquet").absolute()]
    assert "same file, b.jsonl" in refusal(data={"train": ["a.jsonl", "b.jsonl"], "eval": "b.jsonl"})
    assert "| `data.train` | path or list of path or `null` | `null` |" in reference.page()
    assert "| `data.template_kwargs` | names with values | `{}` |" in reference.page()
