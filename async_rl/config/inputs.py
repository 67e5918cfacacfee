"""The settings of what a run is given: the model, prompts to train and to evaluate on, rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from async_rl.config.fields import (
    Arguments,
    DataFiles,
    Dtype,
    FunctionName,
    NonNegative,
    NonNegativeFloat,
    PartName,
    PathName,
    Positive,
    PositiveFloat,
    Section,
    StopStrings,
)

RowFormat = Literal["plain", "messages", "verl", "trl"]
RewardName = Annotated[str, Field(pattern=r"^((verl|trl):)?[\w.]+:\w+$")]


class ModelSection(Section):
    """The model to train."""

    path: PathName
    """Hugging Face checkpoint folder with config.json, *.safetensors and tokenizer."""
    dtype: Dtype = "bfloat16"
    """Parameter type of the trainer, and of the engines unless rollout.dtype is set."""
    trust_remote_code: bool = False
    """Whether to run code that comes with the checkpoint."""


class SourceSection(Section):
    """One of several datasets that a run trains on."""

    path: DataFiles
    """Its files, as in data.train."""
    weight: NonNegativeFloat = 1.0
    """Its share of the prompts issued, relative to the weights of the other sources."""
    format: RowFormat | None = None
    """As data.format; null for its value."""
    prompt_field: str | None = None
    """As data.prompt_field; null for its value."""
    system_prompt: str | None = None
    """As data.system_prompt; null for its value."""
    order_by: str | None = None
    """As data.order_by; null for its value."""
    limit: Positive | None = None
    """Use the first so many rows alone; null for all."""
    max_response_tokens: Positive | None = None
    """As rollout.max_response_tokens, and at most that; null for its value."""
    environment: FunctionName | None = None
    """As rollout.environment.function; null for its value."""
    agent: PartName | None = None
    """The one of rollout.agents that plays its rollouts; null for rollout.agent, or where that names none for responses
    as of a run without agents."""
    temperature: PositiveFloat | None = None
    """As rollout.temperature; null for its value."""
    stop: StopStrings = Field(default_factory=list)
    """Stop strings beside those of rollout.stop."""
    stop_token_ids: list[NonNegative] = Field(default_factory=list)
    """Stop tokens beside those of rollout.stop_token_ids."""


class RowSampling(Section):
    """What a row says in data.sampling_field."""

    temperature: PositiveFloat | None = None
    max_response_tokens: Positive | None = None
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: list[NonNegative] = Field(default_factory=list)


class DataSection(Section):
    """The prompts to train and evaluate on."""

    train: DataFiles | None = None
    """JSONL, Parquet or Arrow file with one prompt per row, a folder that datasets has saved with save_to_disk, a
    pattern such as data/*.parquet, or a list of these; the fields other than data.prompt_field are passed to the
    reward. Required unless data.sources is set. With data.allow_download also hf:NAME:SPLIT or
    hf:NAME:CONFIGURATION:SPLIT, a dataset of the Hugging Face Hub."""
    sources: Annotated[dict[PartName, SourceSection], Field(max_length=32)] = Field(default_factory=dict)
    """Several datasets by name in place of data.train, for example {math: {path: math.jsonl, weight: 3}, code: {path:
    code.jsonl, prompt_field: task}}. Of every so many prompts issued, each source has its share by weight, to less than
    one prompt. format, prompt_field and system_prompt replace those of data for the source, limit takes its first rows
    alone. On the command line: --data.sources.math.weight 2."""
    eval: DataFiles | None = None
    """As data.train, of held-out prompts; null switches evaluation off."""
    format: RowFormat = "plain"
    """How rows are laid out. A prompt that is a list of messages is always rendered with the chat template; one that is
    text is taken as it stands (plain, trl) or as the message of a user (messages, verl). verl also needs data_source
    and reward_model.ground_truth."""
    prompt_field: str = "prompt"
    """Name of the field that contains the prompt: text, or messages."""
    system_prompt: str | None = None
    """System message for prompts that begin with none of their own."""
    chat_template: PathName | None = None
    """File with a Jinja chat template to use in place of the checkpoint's."""
    template_kwargs: Arguments = Field(default_factory=dict)
    """Variables for the chat template, for example {enable_thinking: false}; those of a row's field
    chat_template_kwargs win."""
    tools: PathName | None = None
    """JSON file with a list of tools that the chat template describes to the policy; a row's field tools wins."""
    rows_in_memory: Positive = 20_000
    """How many rows are read and checked before a run starts, and kept in memory. Later rows are read from the files
    when their turn comes; a Parquet file of more rows is unpacked once, below runs/.data."""
    allow_download: bool = False
    """Whether a dataset that is named hf:... may be downloaded from the Hugging Face Hub, with the library datasets."""
    sampling_field: str | None = None
    """Name of a field that says how the responses to its row are sampled in training, for example {"temperature": 0.7,
    "max_response_tokens": 200, "stop": ["\\n"], "stop_token_ids": [7]}, each of which may be missing: the first two in
    place of its source's, the others beside them. null for no such field."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens; a row with a longer one is a bad row (data.on_bad_row)."""
    on_bad_row: Literal["skip", "fail"] = "fail"
    """What to do with a malformed, empty or too long row: skip it (counted, and reported with its line), or fail the
    run."""
    shuffle: bool = True
    """Whether to shuffle the rows in each epoch, with the run's seed."""
    order_by: str | None = None
    """Column with a number, such as a difficulty, by which the rows come in each epoch, ascending; data.shuffle then
    holds among rows of equal numbers. null for none. All rows are read for it before the run starts."""


class WeightedReward(Section):
    """One of several rewards."""

    function: RewardName
    """The function, as in reward.function."""
    weight: float = 1.0
    """Its factor in the sum."""
    arguments: Arguments = Field(default_factory=dict)
    """As reward.arguments."""
    slow: bool | None = None
    """As reward.slow; null for its value."""
    applies_to: Annotated[list[PartName], Field(min_length=1)] | None = None
    """Sources of data.sources and sets of eval.sets, by name, whose responses it scores; the name of data.train is
    train, that of data.eval held_out. null for all. On the command line: --reward.functions.right.applies_to
    '[math, aime]'."""


class RewardSection(Section):
    """The functions that score responses."""

    function: RewardName = "async_rl.rollout.rewards.text:exact_match"
    """The reward as module:function, called as f(prompt: Prompt, response: str), or with those of prompt, response,
    turns, finish_reason, completion_ids, fields and the row's columns that its signature names. It returns a number, a
    mapping of named numbers with the reward as score, or None where it does not apply: the response is left out of its
    group (see rollout.min_group_size). verl:module:function is called as verl calls compute_score,
    trl:module:function as TRL calls a reward, once for a group."""
    functions: Annotated[dict[PartName, WeightedReward], Field(max_length=16)] = Field(default_factory=dict)
    """Several rewards by name in place of reward.function, of which the weighted sum is the reward, for example
    {right: {function: "my:right"}, form: {function: "my:form", weight: 0.2}}. One that returns None drops out of the
    sum. On the command line: --reward.functions.form.weight 0.5."""
    arguments: Arguments = Field(default_factory=dict)
    """Values for arguments of reward.function by name, for example {pattern: "<answer>.*</answer>"}; columns of the
    same name are not passed."""
    slow: bool = False
    """Whether to run a plain reward in worker processes; set it for rewards that wait for a service, compute for long,
    use signals or may hang. Rewards that are async def have an event loop of their own."""
    timeout_s: PositiveFloat = 30.0
    """Seconds that a call of a slow or async reward may take before it is ended; see reward.on_error for what happens
    then. The reward rewards.code:unit_tests has a time limit for each program instead."""
    workers: Positive | None = None
    """Worker processes of a slow reward, and programs of rewards.code, that run at one time per replica; further calls
    wait, which does not count towards their time limits. null for 32 processes, which are started as they are needed,
    and for one program per core, at most 8."""
    retries: NonNegative = 2
    """Further attempts, after 0.5 s, 1 s, 2 s and so on, when a slow or async reward raises an exception or an async
    one takes too long; what has used up its time in a worker process is not tried again."""
    rate_limit: NonNegative = 0
    """Calls of the reward per reward.rate_period_s and replica; 0 for no limit."""
    rate_period_s: PositiveFloat = 1.0
    """Period of reward.rate_limit, in seconds."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do when a reward finally raises, times out or is not finite: fail the run, or skip the response if
    rollout.min_group_size allows, else its group (counted)."""
    truncated: Literal["score", "leave_out"] = "score"
    """What to do with a response that ends at rollout.max_response_tokens: score it as any other, or leave it out of
    its group without a call of the reward, if rollout.min_group_size allows, else give up its group. Evaluations score
    all."""
    overlong_tokens: NonNegative = 0
    """Tokens below rollout.max_response_tokens from which on a longer response loses reward, linearly, up to
    reward.overlong_penalty at the limit; 0 for none. Evaluations leave it out."""
    overlong_penalty: PositiveFloat = 1.0
    """The reward that a response of rollout.max_response_tokens loses; see reward.overlong_tokens."""


TRAIN = "train"
"""The name of data.train, beside those of data.sources."""

HELD_OUT = "held_out"
"""The name of the set of data.eval, beside those of eval.sets."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for the responses to the prompts of one source, or to the problems of one evaluation set."""

    name: str
    """The name of the source or set."""
    max_response_tokens: int
    environment: str | None = None
    """The function of the environment that answers the policy between its turns; None for a single turn."""
    temperature: float = 1.0
    """Sampling temperature in training."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Beside the end-of-sequence tokens of the checkpoint."""
    agent: str | None = None
    """The section of the agent that plays the rollouts, for example rollout.agents.shell; None for responses."""


class EvalSetSection(Section):
    """A set of problems to evaluate on, and how its responses are sampled."""

    path: DataFiles
    """JSONL or Parquet file, pattern or list, laid out as data.train is and read by the settings of data."""
    k: Positive = 1
    """Responses per problem."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling's probability mass. Nothing of an evaluation is trained on, so that any value is right."""
    top_k: NonNegative = 0
    """Likeliest tokens to sample from; 0 for all."""
    limit: Positive | None = None
    """Number of problems, the first of the file; null for all."""
    max_response_tokens: Positive | None = None
    """As rollout.max_response_tokens, for this set; null for its value. With more than that, each engine keeps room for
    the longer responses."""
    environment: FunctionName | None = None
    """As rollout.environment.function, for this set; null for its value."""
    agent: PartName | None = None
    """As data.sources.NAME.agent, for this set."""
    stop: StopStrings = Field(default_factory=list)
    """Stop strings beside those of rollout.stop."""
    stop_token_ids: list[NonNegative] = Field(default_factory=list)
    """Stop tokens beside those of rollout.stop_token_ids."""
    every: NonNegative | None = None
    """As eval.every, for this set; null for its value."""
    pass_at: float = 1.0
    """Reward from which on a response passes, for pass@k."""
    pass_k: list[Positive] | None = None
    """The k of the pass@k to report, each at most k; null for 1 and k."""
    source_field: str = "data_source"
    """Column with the name of a problem's source; results are also given for each source. Problems without it count in
    the whole set only."""

    @property
    def pass_sizes(self) -> tuple[int, ...]:
        """The k of each pass@k that is reported, ascending."""
        return tuple(sorted({1, self.k} if self.pass_k is None else set(self.pass_k)))


class EvalSection(Section):
    """Evaluation on held-out prompts."""

    n: Positive = 256
    """Number of held-out prompts to evaluate, greedily, before the first and after the last step."""
    every: NonNegative = 0
    """Policy versions between further evaluations, each while the engine has that version; 0 for none."""
    beside_rollouts: bool = True
    """Whether rollouts continue during an evaluation within training, for whose end the next weight sync waits. false
    pauses them: the evaluation takes less time, and nothing is sampled until its longest response has ended."""
    sets: Annotated[dict[PartName, EvalSetSection], Field(max_length=16)] = Field(default_factory=dict)
    """Further sets of problems by name, evaluated when the held-out prompts are, for example {aime: {path: aime.jsonl,
    k: 16, temperature: 0.6}}. The name held_out is that of the held-out prompts."""
