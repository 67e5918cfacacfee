"""The settings of the rollouts: engines, sampling, environments, filters, and how far they run ahead of training."""

from __future__ import annotations

import math
import shlex
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from async_rl.config.fields import (
    Arguments,
    Dtype,
    FunctionName,
    NonNegative,
    NonNegativeFloat,
    PartName,
    PathName,
    Positive,
    PositiveFloat,
    RoutingPolicy,
    Section,
    StopStrings,
)

EngineName = Annotated[str, Field(pattern=r"^(vllm|sglang|[\w.]+:\w+)$")]


Recovery = Literal["restart", "replay", "state"]
# An agent that waits for its tools three quarters of the time keeps a place busy with three others.
_ROLLOUTS_PER_PLACE = 4


class PartialRolloutSection(Section):
    """What happens to generations in flight at a weight sync."""

    mode: Literal["resume", "in_flight", "drain"] = "resume"
    """What happens to a generation at a weight sync: it is aborted and resumed by prefilling it again (resume), paused
    and continued on its old KV cache (in_flight), or finished before the sync (drain)."""
    routing: RoutingPolicy = "replace"
    """Which routed experts a resumed generation is trained with: those of the resumed call, which covers all earlier
    tokens (replace); the earlier ones, extended by the resumed call (preserve); or for each segment those of its own
    call, at the cost of computing prefixes again (exact)."""


class AsyncTrainingSection(Section):
    """How far generation may run ahead of training, and how old tokens may be."""

    staleness_threshold: NonNegativeFloat = 0.5
    """Admission: groups that may be outstanding beyond those that a version window consumes, as a share of these."""
    max_staleness: NonNegative = 4
    """Hard bound: no token older than this many versions contributes a gradient."""
    on_stale: Literal["mask", "drop"] = "mask"
    """What to do with tokens over the bound: mask them one by one, or drop the group and issue its prompt again."""
    trigger_parameter_sync_step: Positive = 1
    """Training steps per weight sync."""
    require_batches: Positive = 1
    """Mini-batches that must be ready before a training step starts; each is one optimizer update."""
    partial_rollout: PartialRolloutSection = PartialRolloutSection()


class EnvironmentSection(Section):
    """The environment that answers the policy between its turns."""

    function: FunctionName | None = None
    """The environment as module:function, called as f(prompt: Prompt, turns: tuple[str, ...]) when the policy stops.
    Text that it returns is appended as it stands, and the policy continues; messages, for example [{"role": "tool",
    "content": "4"}], are appended as the chat template writes them after a turn; None ends the response."""
    max_turns: Annotated[int, Field(ge=2, lt=2**63)] = 8
    """Turns of the policy in one response, which ends with the last of them."""
    slow: bool = True
    """Whether to run an environment that is a plain function in worker processes; false calls it at once, which suits
    functions of microseconds. Environments that are async def have an event loop of their own."""
    timeout_s: PositiveFloat = 30.0
    """Seconds that a call of the environment may take before it is ended; see rollout.environment.on_error for what
    happens then."""
    workers: Positive = 32
    """Worker processes per replica if the environment is a plain function, started as they are needed; further calls
    wait, which does not count towards their time limit."""
    retries: NonNegative = 2
    """Further attempts, after 0.5 s, 1 s, 2 s and so on, when an environment that is slow or async raises an exception,
    or an async one takes too long."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do when the environment finally raises, times out or returns no text: fail the run, or skip the response
    if rollout.min_group_size allows, else its group (counted)."""


AGENT = "rollout.agent"
"""The section of the agent that plays what names no other."""

_AGENTS = "rollout.agents."


def agent_section(name: str) -> str:
    """Return the section of one of rollout.agents."""
    return f"{_AGENTS}{name}"


def in_section(message: str, section: str) -> str:
    """Return a message that names settings of rollout.agent with those of an agent's section in their place.

    Environments and their hosts do not know which agent they are of.
    """
    return message.replace(f"{AGENT}.", f"{section}.")


def agent_name(section: str) -> str:
    """Return the name under which metrics have the agent of a section; that of rollout.agent is agent."""
    return "agent" if section == AGENT else section.removeprefix(_AGENTS)


class AgentSection(Section):
    """A program that asks the policy by itself, in place of one response or an environment."""

    function: FunctionName | None = None
    """The agent as module:function, an async def that is called as f(prompt: Prompt, policy: Policy, context: Context)
    for each rollout, on the worker's event loop, and returns the reward: a number, a mapping of named numbers, or an
    Outcome. It asks with policy.chat, policy.complete and policy.extend, also several times at once. The rewards of the
    settings are not called. A rollout that has not ended when its worker or the run does is made again."""
    command: Annotated[list[str], Field(min_length=1)] | None = None
    """In place of a function, a program with its arguments, which is started for each rollout. It gets the row as JSON
    on its standard input, and OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL in its environment; the last line of
    its standard output is the reward as JSON, a number or an object of named numbers."""
    environment: FunctionName | None = None
    """In place of a function, an environment with state as module:Class, of which each rollout has an instance: setup,
    then step after each turn of the policy or the tools that it calls, then reward, and close whatever happens; or
    rollout, which makes all of it and asks the policy over HTTP. Also a class for TRL's environment_factory, a function
    that returns an environment of skyrl-gym, gem or textarena, and the classes for environments of verifiers and of
    OpenEnv's servers."""
    arguments: Arguments = Field(default_factory=dict)
    """What the class of rollout.agent.environment is called with, by name, for example {env_id: Wordle-v0}."""
    inline: bool = False
    """Whether environments run in the worker's process, methods that are async on its event loop; else they run in
    processes of their own, of which one that crashes costs its rollouts alone."""
    python: PathName | None = None
    """The Python that runs environments, for example of a virtual environment with their libraries; it needs msgpack.
    Null for the worker's own."""
    hosts: Positive = 1
    """Processes per worker that environments are spread over."""
    recovery: Recovery = "restart"
    """What becomes of a rollout with an environment when its worker or the run ends, or its environment host dies. It
    is made again, and fails where the host died (restart). It continues where it was, after a new environment was set
    to the last state that get_state returned (state), or was given the same seeds and all that the policy has said,
    and has answered the same (replay). Other agents can only be made again."""
    max_recoveries: NonNegative = 3
    """How often in a row, without a step between, a rollout continues after its environment host has died, with
    rollout.agent.recovery state or replay, before it fails; and how often it is begun again because it cannot
    continue."""
    concurrent: Positive = 256
    """Environments that a worker may have open; further rollouts wait, which does not count towards their limits."""
    setup_s: PositiveFloat = 120.0
    """Seconds for the setup of an environment, those excluded for which the engine is paused, as for the next two."""
    step_s: PositiveFloat = 60.0
    """Seconds for a step of an environment, or for one call of a tool."""
    score_s: PositiveFloat = 60.0
    """Seconds for the reward of an environment."""
    close_s: PositiveFloat = 30.0
    """Seconds for an environment to close; one that takes longer is left as it is, and counted."""
    tool_answer_chars: Positive = 16_384
    """Characters of a tool's answer that the policy gets; the rest is cut off, with a note that says so."""
    gateway_host: str = "127.0.0.1"
    """Address on which each rollout worker serves the policy as OpenAI's API does, to programs and to functions that
    use policy.base_url; 0.0.0.0 for all interfaces, if agents run on other hosts. Each rollout has a key."""
    timeout_s: PositiveFloat | None = None
    """Seconds that a rollout may take, those excluded for which its engine is paused; null for any number. One that
    takes longer is ended, and counts as an agent that raised."""
    max_turns: Positive | None = None
    """Turns of the policy in one rollout; null for any number. A request beyond this or a limit below is refused."""
    max_sampled_tokens: Positive | None = None
    """Tokens that the policy samples in one rollout, over all its trajectories; null for any number. Each trajectory is
    within rollout.max_response_tokens, of which a fork has what its branch has left."""
    max_branches: Positive = 64
    """Trajectories of one rollout. An agent that does not send back what was said as it was said makes one for each
    request."""
    tool_parser: str | None = "auto"
    """Which of vLLM's tool parsers makes calls of what the policy writes, for agents that name tools: auto for one that
    reads what the chat template writes; null for none. Reasoning is found by the marks of the chat template."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do when an agent raises, fails or gives no reward: fail the run, or skip the rollout if
    rollout.min_group_size allows, else its group (counted)."""

    @property
    def given(self) -> dict[str, str]:
        """What names the agent, by the key of this section: one at most, none where there is no agent."""
        command = None if self.command is None else shlex.join(self.command)
        named = {"function": self.function, "command": command, "environment": self.environment}
        return {key: value for key, value in named.items() if value is not None}


class FilterSection(Section):
    """Finished groups that are not trained because they would teach nothing; other prompts take their places."""

    zero_variance: bool = False
    """Whether to filter groups whose rewards are all equal, as DAPO's dynamic sampling does; else they are trained with
    advantages of zero. As with the other filters, the prompt of a filtered group is done for the epoch, and rewards are
    taken as the reward functions return them, without the penalty of reward.overlong_tokens."""
    all_truncated: bool = False
    """Whether to filter groups of which every response ended at rollout.max_response_tokens."""
    mean_reward: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Lowest and highest mean reward of a group that is trained, for example [0.05, 0.95]; null for any."""
    function: FunctionName | None = None
    """A module:function that decides in addition, called as f(group: FinishedGroup) -> bool, at once, on the worker's
    event loop; groups for which it returns false are filtered. One that raises is treated like a reward that does
    (reward.on_error)."""
    rest_epochs: NonNegative = 0
    """Epochs after its own in which the row of a filtered group is passed over; 0 to try it again in the next. Where
    all rows rest, none does."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the last 200 groups to end that may be filtered; above it the run logs a warning, and fails if that
    lasts for watchdog.abort_s. 1 for any."""

    @property
    def active(self) -> bool:
        """Whether any group may be filtered."""
        return self.zero_variance or self.all_truncated or self.mean_reward is not None or self.function is not None


class SglangSection(Section):
    """SGLang's server, where it is the engine."""

    python: PathName | None = None
    """The Python of a virtual environment that has sglang, on each host, where it is not the run's own: on GPUs its
    dependencies are others than vLLM's (make setup ENGINE=sglang). It is asked for its versions before it is used."""


class ReplicaRange(Section):
    """How many replicas a run has whose hosts come and go."""

    min: Positive
    """Replicas with which the run starts."""
    max: Positive
    """Replicas that the run asks the cluster for."""


def _kind_of_replicas(value: Any) -> str:
    """Return by which of its two types rollout.replicas is judged, so that a fault is reported once."""
    return "range" if isinstance(value, dict | ReplicaRange) else "number"


class RolloutSection(Section):
    """The rollout engines and how they sample."""

    replicas: Annotated[
        Annotated[Positive, Tag("number")] | Annotated[ReplicaRange, Tag("range")], Discriminator(_kind_of_replicas)
    ] = 1
    """Number of replicas, each a rollout engine with its worker. Or {min: 2, max: 8} where hosts come and go, as with
    an autoscaler or preemptible hosts: the run starts with min replicas, asks Ray for places for max, and takes in each
    further replica once it has a host. Those of a host that goes are asked for again. On the command line:
    --rollout.replicas.min 2 --rollout.replicas.max 8."""
    engine: EngineName = "vllm"
    """The engine that samples: vllm, sglang, or module:Class of one that has the methods of RolloutEngine."""
    engines: list[EngineName] = Field(default_factory=list)
    """Several engines in one run, for example [vllm, sglang]: replica 0 has the first, replica 1 the second, and after
    the last the first again. Empty for rollout.engine in all of them."""
    dtype: Dtype | None = None
    """Parameter type of the engines; null for the trainer's (model.dtype)."""
    quantization: Literal["fp8_per_block", "fp8_per_channel", "fp8_per_tensor"] | None = None
    """Form in which vLLM's engines keep the weights of linear layers and experts, which they make of the trainer's at
    the start and at each push: fp8 with a scale for 128 x 128 weights, for each output channel or for each tensor. Null
    for rollout.dtype, which embeddings, output layer, norms and routers have in any case. On CPUs it is fp8_per_channel
    or null, and experts keep rollout.dtype."""
    kv_cache_dtype: Literal["fp8"] | None = None
    """Type of the keys and values in the caches of vLLM's engines; null for rollout.dtype. On CPUs fp8 takes
    AVX-512."""
    return_routed_experts: bool = True
    """Whether the engine of a MoE model returns each token's routed experts; trainer.router_replay R3 needs them."""
    n: Positive = 8
    """Responses per prompt, that is, trajectories per group; 1 only with an estimator that needs no group
    (trainer.loss.advantage reinforce_plus_plus, or a function)."""
    max_response_tokens: Positive = 1024
    """Longest response, in tokens over all its segments."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; behaviour log-probs are those of the distribution after it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling's probability mass; only 1 can be trained on, because the trainer's log-probs are of the whole
    vocabulary."""
    top_k: Annotated[int, Field(ge=-1, lt=2**63)] = 0
    """How many of the likeliest tokens may be sampled, 0 or -1 for all; only all can be trained on, as with
    rollout.top_p."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest probability, as a share of the likeliest token's, that may be sampled; only 0 can be trained on, as with
    rollout.top_p."""
    presence_penalty: float = 0.0
    """What a token's logit loses if the response has it; only 0 can be trained on, because the trainer's log-probs are
    those of the model."""
    frequency_penalty: float = 0.0
    """What a token's logit loses each time that the response has it; only 0 can be trained on, as with
    rollout.presence_penalty."""
    repetition_penalty: PositiveFloat = 1.0
    """What the logit of a token that prompt or response has is divided by; only 1 can be trained on, as with
    rollout.presence_penalty."""
    min_tokens: NonNegative = 0
    """Tokens before which no stop token could be sampled; only 0 can be trained on, because the trainer's log-probs
    are of the whole vocabulary, stop tokens included."""
    stop: StopStrings = Field(default_factory=list)
    """Strings at which a response, or a turn of it, ends, for example ["</answer>"]. It ends with the token that
    completes the string, all of which stays in it, and has finish_reason stop. Evaluations end so too. A token for
    rollout.stop_token_ids takes less time than a string."""
    stop_token_ids: list[NonNegative] = Field(default_factory=list)
    """Further tokens that end a response, or a turn of it, beside the end-of-sequence tokens of the checkpoint."""
    max_num_seqs: Positive = 128
    """Sequences that one engine decodes at once: its places."""
    max_trajectories: Positive | None = None
    """Rollouts that one replica has in the making; null for rollout.max_num_seqs, and with rollout.agent for four times
    that. A rollout that waits for a tool has no place in the engine, and others decode meanwhile: those of agents begin
    one by one, whenever a place is free (see rollout.max_kv_use); with rollout.environment, set it higher."""
    max_kv_use: PositiveFloat | None = 0.8
    """With agents, share of an engine's KV cache that the rollouts of a replica may have in their contexts, those
    included that wait for tools, before those of a further group begin; one that has little counts as much as others
    had in the mean. The rest is for what rollouts that have ended leave behind. Above it, a turn after a long tool
    finds what came before it gone from the cache, and computes it again: raise it where that costs less than free
    places. Null for any."""
    max_num_batched_tokens: Positive = 4096
    """Tokens of one engine step, including prefill."""
    kv_cache_bytes: Positive = 512 * 2**20
    """Bytes of one engine's KV cache on CPU, and on a GPU that it shares (resources.share_gpu); on GPUs of its own
    rollout.gpu_memory_utilization decides."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of a GPU's memory that one engine takes."""
    tensor_parallel_size: Positive = 1
    """GPUs that share each layer of an engine."""
    data_parallel_size: Annotated[int, Field(gt=0, le=8)] = 1
    """Copies that an engine has of all but its experts, each on rollout.tensor_parallel_size GPUs of their own; the
    experts are spread over all of them. A copy computes other sequences than the others, with its share of
    rollout.max_num_seqs and a KV cache of its own. At most 8, as the canary has a sequence for each. For mixtures of
    experts whose attention is not worth dividing further, as latent attention, of which every GPU of a tensor-parallel
    engine caches the whole."""
    hosts_per_engine: Positive = 1
    """Hosts that each engine spans, with as many of its GPUs on each; for models that the GPUs of one host cannot
    hold. Their ranks then exchange activations over the network."""
    enforce_eager: bool = False
    """Whether to skip compilation, so that the engine starts sooner and decodes more slowly."""
    engine_args: Arguments = Field(default_factory=dict)
    """Further arguments of the engine, by the names of vLLM's AsyncEngineArgs or SGLang's ServerArgs, for example
    {enable_expert_parallel: true}, for what no setting names."""
    group_timeout_s: PositiveFloat | None = None
    """Seconds that a group may take, with rollout.agent from when the last of its rollouts has begun; then it is
    published with the responses that are finished, if they are enough (rollout.min_group_size), or its prompt is issued
    again."""
    min_group_size: Annotated[int, Field(ge=2, lt=2**63)] | None = None
    """Responses with which a group may be published: the finished ones after rollout.group_timeout_s, and those left
    when others have failed or have no reward; null for all n."""
    max_attempts: Positive = 3
    """How many groups of one prompt may exceed rollout.group_timeout_s before the prompt is given up."""
    max_failed_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the last groups to end that may be given up (by reward, environment, engine, time-out or staleness)
    before the run fails; 1 for any."""
    sglang: SglangSection = SglangSection()
    filter: FilterSection = FilterSection()
    environment: EnvironmentSection = EnvironmentSection()
    agent: AgentSection = AgentSection()
    agents: Annotated[dict[PartName, AgentSection], Field(max_length=16)] = Field(default_factory=dict)
    """Several agents by name, each with the settings of rollout.agent for itself, for example {shell: {environment:
    "my:Shell", hosts: 4, max_turns: 30}, game: {environment: "my:Game", python: /venvs/game/bin/python}}. They play the
    rollouts of the sources and evaluation sets that name them (data.sources.NAME.agent, eval.sets.NAME.agent). On the
    command line: --rollout.agents.shell.max_turns 30."""

    @property
    def agent_sections(self) -> dict[str, AgentSection]:
        """The agents of the run by the sections of the settings that have them, for example rollout.agents.shell."""
        single = {AGENT: self.agent} if self.agent.given else {}
        return single | {agent_section(name): agent for name, agent in self.agents.items()}

    @property
    def engine_ranks(self) -> int:
        """GPUs per engine."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def places_per_rank(self) -> int:
        """Sequences that one data-parallel rank of an engine decodes at once."""
        return math.ceil(self.max_num_seqs / self.data_parallel_size)

    @property
    def engine_names(self) -> tuple[str, ...]:
        """The engines that the run uses, each once; see rollout.engines."""
        return tuple(dict.fromkeys(self.engines or [self.engine]))

    @property
    def engine_setting(self) -> str:
        """The setting that names them."""
        return "rollout.engines" if self.engines else "rollout.engine"

    def engine_of(self, replica: int) -> str:
        """Return the engine that a replica has."""
        engines = self.engines or [self.engine]
        return engines[replica % len(engines)]

    @property
    def replica_range(self) -> ReplicaRange:
        """The fewest and the most replicas; equal unless rollout.replicas says otherwise."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas
        return ReplicaRange(min=self.replicas, max=self.replicas)

    @property
    def elastic(self) -> bool:
        """Whether replicas come and go with their hosts; see rollout.replicas."""
        return isinstance(self.replicas, ReplicaRange)

    @property
    def trajectory_limit(self) -> int:
        """Rollouts that one replica has in the making; see rollout.max_trajectories."""
        return self.max_trajectories or self.max_num_seqs * (_ROLLOUTS_PER_PLACE if self.agent_sections else 1)

    @property
    def evaluated_at_once(self) -> int:
        """Rollouts of an evaluation that one replica makes at one time. They begin without a look at the KV cache."""
        return self.max_trajectories or self.max_num_seqs
