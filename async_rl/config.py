"""One typed tree of settings. Each field has its sentence; unknown keys are rejected. Knows only ``errors``.

The names follow verl's fully-async recipe where it has one. ``load`` reads a YAML file and dotted overrides;
combinations that can be judged without looking at the machine or the model are refused here, the rest by
``doctor``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from async_rl.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PathName = Annotated[Path, Field(strict=False)]  # YAML has no paths; a string is one
RoutingPolicy = Literal["replace", "preserve", "exact"]
Dtype = Literal["float32", "bfloat16"]
FunctionName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


class Section(BaseModel):
    """A node of the tree: frozen, no unknown keys, no infinities, and no "3" or true taken for 3."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    path: PathName
    """Hugging Face checkpoint folder: config.json, *.safetensors, tokenizer."""
    dtype: Dtype = "bfloat16"
    """Parameter type of the trainer, and of the engine unless rollout.dtype says otherwise."""
    trust_remote_code: bool = False
    """Allow code that comes with the checkpoint to run."""


class DataSection(Section):
    train: PathName
    """JSONL file, one prompt per line; the fields besides data.prompt_field are handed to the reward."""
    eval: PathName | None = None
    """JSONL file of held-out prompts; none switches evaluation off."""
    prompt_field: str = "prompt"
    """Name of the field that holds the prompt text."""
    max_prompt_tokens: Positive = 512
    """A longer prompt is a bad row."""
    on_bad_row: Literal["skip", "fail"] = "fail"
    """A malformed, empty or too long row is counted and reported with its line, or ends the run."""
    shuffle: bool = True
    """Shuffle the rows anew in each epoch, by the run's seed."""


class RewardSection(Section):
    function: FunctionName = "async_rl.rollout.rewards.text:exact_match"
    """module:function called as f(prompt: Prompt, response: str) -> float."""
    slow: bool = False
    """Run it in a thread off the event loop; for rewards that wait for something or compute for long."""
    timeout_s: PositiveFloat = 30.0
    """A slow reward that takes longer fails its group."""
    rate_limit: NonNegative = 0
    """Calls of a slow reward per reward.rate_period_s and replica; 0 is unlimited."""
    rate_period_s: PositiveFloat = 1.0
    """Period of reward.rate_limit, in seconds."""
    on_error: Literal["fail", "skip"] = "fail"
    """A reward that raises, times out or is not finite fails the run, or its group only (counted)."""


class PartialRolloutSection(Section):
    mode: Literal["resume", "in_flight", "drain"] = "resume"
    """At a push: abort, then re-prefill; pause in place and go on with the old KV cache; or finish first."""
    routing: RoutingPolicy = "replace"
    """Routing of a resumed generation: the resumed call's replaces the earlier one; earlier rows stay and only new ones
    are added; or each segment is trained with its own call's, at the price of computing prefixes again."""


class AsyncTrainingSection(Section):
    staleness_threshold: NonNegativeFloat = 0.5
    """Admission: how many more groups than a version window consumes may be outstanding, as a share."""
    max_staleness: NonNegative = 4
    """Hard bound: no token older than this many versions contributes a gradient."""
    on_stale: Literal["mask", "drop"] = "mask"
    """Tokens over the bound are masked one by one, or the group is dropped and its prompt issued again."""
    trigger_parameter_sync_step: Positive = 1
    """Training steps per weight push."""
    require_batches: Positive = 1
    """Mini-batches that must be ready before a training step starts; each is one optimizer update."""
    partial_rollout: PartialRolloutSection = PartialRolloutSection()


class EnvironmentSection(Section):
    function: FunctionName | None = None
    """module:function called as f(prompt: Prompt, turns: tuple[str, ...]) -> str | None when the policy has stopped:
    what it returns is appended and the policy goes on, None ends the response."""
    max_turns: Annotated[int, Field(ge=2)] = 8
    """Turns of the policy in one response; it ends with the last of them."""
    timeout_s: PositiveFloat = 30.0
    """A call that takes longer has failed."""
    on_error: Literal["fail", "skip"] = "fail"
    """An environment that raises, times out or returns no text fails the run, or its group only (counted)."""


class RolloutSection(Section):
    replicas: Positive = 1
    """Rollout engines."""
    dtype: Dtype | None = None
    """Parameter type of the engines where it is not the trainer's (model.dtype)."""
    return_routed_experts: bool = True
    """Have a MoE engine return which experts each token went to; R3 needs it."""
    n: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt."""
    max_response_tokens: Positive = 1024
    """Limit of a response, over all its segments."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; behaviour log-probs are of the distribution after it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; behaviour log-probs are of the distribution after it."""
    max_num_seqs: Positive = 128
    """Sequences that one engine decodes at once."""
    max_num_batched_tokens: Positive = 4096
    """Tokens of one engine step, prefill included."""
    kv_cache_bytes: Positive = 512 * 2**20
    """Size of one engine's KV cache on CPU; GPUs go by rollout.gpu_memory_utilization."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of a GPU's memory that one engine takes."""
    tensor_parallel_size: Positive = 1
    """GPUs per engine."""
    enforce_eager: bool = False
    """Skip compilation: the engine starts sooner and decodes slower."""
    environment: EnvironmentSection = EnvironmentSection()


class ParallelSection(Section):
    dp: Positive = 1
    """Data-parallel ranks."""
    tp: Positive = 1
    """Tensor-parallel size."""
    ep: Positive = 1
    """Expert-parallel size."""
    etp: Positive = 1
    """Tensor-parallel size within an expert."""
    pp: Positive = 1
    """Pipeline-parallel size."""
    vpp: Positive = 1
    """Virtual pipeline stages per pipeline rank."""
    cp: Positive = 1
    """Context-parallel size."""


class OptimizerSection(Section):
    lr: PositiveFloat = 1e-6
    """Learning rate after warm-up."""
    warmup_steps: NonNegative = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first decay rate."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second decay rate."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip_grad: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""


class LossSection(Section):
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the importance ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """Upper clip of the importance ratio: 1 + clip_high."""
    normalize_by_std: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""


class TrainerSection(Section):
    steps: Positive = 100
    """Training steps of the run."""
    groups_per_step: Positive = 16
    """Groups in one mini-batch, that is, per optimizer update."""
    tokens_per_microbatch: Positive = 8192
    """Sequences are packed into microbatches of at most this many tokens, padding aside."""
    microbatch_multiple: Positive = 1
    """Pad each microbatch to a multiple of this many tokens: 1 is no padding, kernels in fp8 want 16 or more."""
    router_replay: Literal["R3", "R2", "off"] = "R3"
    """Replay the rollout engine's routing, the trainer's own of its log-prob pass, or none."""
    verify_replay_steps: NonNegative = 3
    """Compare experts executed with experts asked for during this many first steps."""
    router_fusion: bool = False
    """Megatron's fused router kernel (Transformer Engine): faster, and blind to replay."""
    recompute: Literal["none", "full"] = "none"
    """Activation recomputation."""
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()


class QueueSection(Section):
    max_groups: Positive | None = None
    """Bound by groups; by default what the staleness budget can have outstanding."""
    max_bytes: Positive = 2 * 2**30
    """Bound by payload bytes."""


class SyncSection(Section):
    backend: Literal["shm", "nccl"] = "shm"
    """How weights travel: shared memory of one host, or vLLM's NCCL engine."""
    canary_tolerance: PositiveFloat | None = None
    """Largest |engine - trainer| log-prob on the canary; by default 1e-4 in float32, 0.5 in bfloat16. The mean over its
    tokens may be a tenth of that."""
    timeout_s: PositiveFloat = 120.0
    """A push that takes longer fails the run."""


class EvalSection(Section):
    n: Annotated[int, Field(ge=1)] = 256
    """Held-out problems evaluated, greedily, before the first and after the last step."""
    every: NonNegative = 0
    """Also every this many policy versions, while the engine stands at that version; 0 is never."""


class MetricsSection(Section):
    host: str = "127.0.0.1"
    """Interface of each process's /metrics."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to use, one per process upwards; 0 lets the system choose free ones."""
    samples_per_step: NonNegative = 2
    """Trajectories per step written to samples.jsonl in readable form."""


class DebugSection(Section):
    dump_trajectories: NonNegative = 0
    """Keep this many of the last trained groups as wire-format files in the run folder."""


class ResourcesSection(Section):
    pin_cores: bool = True
    """On CPU, pin each engine and each trainer rank to cores of its own where there are enough."""
    engine_threads: Positive = 1
    """Compute threads per engine on CPU."""
    trainer_threads: Positive = 1
    """Compute threads per trainer rank on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engine and trainer compute."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is <runs>/<name>."""
    runs: PathName = Path("runs")
    """Folder that holds the run folders."""
    seed: NonNegative = 0
    """Seed of everything random."""
    prepare: FunctionName | None = None
    """module:function called with this tree before anything starts; makes missing model and dataset."""
    model: ModelSection
    data: DataSection
    reward: RewardSection = RewardSection()
    async_training: AsyncTrainingSection = AsyncTrainingSection()
    rollout: RolloutSection = RolloutSection()
    trainer: TrainerSection = TrainerSection()
    queue: QueueSection = QueueSection()
    sync: SyncSection = SyncSection()
    eval: EvalSection = EvalSection()
    metrics: MetricsSection = MetricsSection()
    debug: DebugSection = DebugSection()
    resources: ResourcesSection = ResourcesSection()

    @property
    def required_groups(self) -> int:
        """Groups that one training step consumes."""
        return self.trainer.groups_per_step * self.async_training.require_batches

    @property
    def run_dir(self) -> Path:
        return self.runs / self.name

    @property
    def engine_dtype(self) -> Dtype:
        """Parameter type of the rollout engines."""
        return self.rollout.dtype or self.model.dtype

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        if self.queue.max_groups is not None and self.queue.max_groups < self.required_groups:
            raise ValueError(
                f"queue.max_groups is {self.queue.max_groups}, but a training step needs "
                f"{self.required_groups} groups at once "
                "(trainer.groups_per_step x async_training.require_batches); raise it to that at least"
            )
        if self.rollout.max_num_batched_tokens < self.rollout.max_num_seqs:
            raise ValueError(
                f"rollout.max_num_batched_tokens is {self.rollout.max_num_batched_tokens}, less than "
                f"rollout.max_num_seqs ({self.rollout.max_num_seqs}): a step decodes one token of each"
            )
        if self.sync.backend == "nccl" and self.resources.device == "cpu":
            raise ValueError(
                "sync.backend is nccl, which needs GPUs, but resources.device is cpu; set sync.backend to shm"
            )
        if self.data.eval is not None and self.data.eval == self.data.train:
            raise ValueError(
                f"data.eval and data.train are the same file, {self.data.eval}; evaluate on other problems"
            )
        self._check_replay()
        if self.trainer.parallel != ParallelSection(dp=self.trainer.parallel.dp):
            raise ValueError(
                "trainer.parallel: only dp may exceed 1 in this version; set tp, ep, etp, pp, vpp, cp to 1"
            )
        return self

    def _check_replay(self) -> None:
        """Raise ValueError for settings under which replay would silently do nothing, or not what its name says."""
        replay, partial = self.trainer.router_replay, self.async_training.partial_rollout
        if replay == "R3" and not self.rollout.return_routed_experts:
            raise ValueError(
                "trainer.router_replay is R3, which replays the engine's routing, but rollout.return_routed_experts is "
                "false; set it to true, or trainer.router_replay to R2 or off"
            )
        if replay != "off" and self.trainer.router_fusion:
            raise ValueError(
                f"trainer.router_replay is {replay}, but trainer.router_fusion is true: the fused router ignores what "
                "it is told to replay; set trainer.router_fusion to false, or trainer.router_replay to off"
            )
        if partial.routing == "exact" and replay != "R3":
            raise ValueError(
                f"async_training.partial_rollout.routing is exact, but trainer.router_replay is {replay}: the routing "
                "of each call is kept to be replayed, which only R3 does; set trainer.router_replay to R3, or "
                "async_training.partial_rollout.routing to replace"
            )
        if partial.routing == "exact" and partial.mode == "in_flight":
            raise ValueError(
                "async_training.partial_rollout.routing is exact, but its mode is in_flight: a generation that goes on "
                "with the KV cache of older weights has no context that could be trained exactly; set mode to resume, "
                "or routing to replace"
            )


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, apply dotted overrides ({"async_training.max_staleness": 2}), validate.

    Raises ConfigError whose message has one line per fault: the key, the value, and the nearest valid ones.
    """
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path}: expected a mapping of keys, got {type(tree).__name__}")
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """Build the tree from nested mappings. Raises ConfigError as ``load`` does."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``--a.b value`` and ``--a.b=value`` to {"a.b": value}; values are YAML, names and paths as written.

    Raises ConfigError for a stray word, a flag without a value, or a key that does not exist.
    """
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}; settings are given as --section.key value")
        key, equals, text = word[2:].partition("=")
        if _field(key) is None:
            raise ConfigError(_unknown(key))
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"--{key} has no value")
            text = value
        try:
            overrides[key] = text if _is_text(key) and text != "null" else _read_yaml(text)
        except yaml.YAMLError:
            overrides[key] = text
    return overrides


def to_yaml(config: RunConfig) -> str:
    """The resolved tree, in the order of its declaration."""
    text: str = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
    return text


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, its sentence) of every setting."""
    for name, info in section.model_fields.items():
        inner = info.annotation
        if _is_section(inner):
            yield from leaves(cast(type[BaseModel], inner), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.description or ""


def default_of(key: str) -> str:
    """The default of a setting as one would write it; "required" where there is none."""
    info = _field(key)
    if info is None:
        raise ConfigError(_unknown(key))
    if info.is_required():
        return "required"
    value = info.get_default()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it (PyYAML reads 1.1): 1e-6 is a number, off a word, and no key may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$", re.I), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """Quotes the words that _Loader, or a reader of YAML 1.1, would take for something else."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _field(key: str) -> FieldInfo | None:
    """The setting of that dotted name; None for a section or an unknown name."""
    section: Any = RunConfig
    *sections, leaf = key.split(".")
    for part in sections:
        info = section.model_fields.get(part)
        if info is None or not _is_section(info.annotation):
            return None
        section = info.annotation
    info = section.model_fields.get(leaf)
    return None if info is None or _is_section(info.annotation) else info


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_text(key: str) -> bool:
    """Whether a setting holds a string or a path, so that --name 7 means the name "7"."""
    info = _field(key)
    options = get_args(info.annotation) if info is not None and get_args(info.annotation) else ()
    kinds = [kind for kind in (options or (info.annotation if info else None,)) if kind is not type(None)]
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    return bool(kinds) and all(kind in (str, Path) or isinstance(kind, str) for kind in kinds)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {section} is {inner!r} in the file, not a section")
        tree = inner
    tree[leaf] = value


def _unknown(key: str) -> str:
    known = [leaf for leaf, _ in leaves()]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    near += [leaf for leaf in known if leaf.rpartition(".")[2] == key.rpartition(".")[2] and leaf not in near]
    near += [leaf for leaf in known if leaf.startswith(f"{key}.") and leaf not in near]
    return f"{key}: no such setting" + (f"; did you mean {', '.join(near[:3])}?" if near else "")


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return _unknown(key)
    if fault["type"] == "missing":
        return f"{key}: required, and missing"
    message: str = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message
    message = message[0].lower() + message[1:]
    choices = _choices(key)
    if fault["type"] == "literal_error" and choices:
        near = difflib.get_close_matches(str(fault["input"]), choices, n=1)
        message = f"must be one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key}: {fault['input']!r} is not valid: {message}"


def _choices(key: str) -> list[str]:
    info = _field(key)
    return [option for option in get_args(info.annotation) if isinstance(option, str)] if info else []
