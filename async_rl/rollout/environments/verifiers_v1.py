"""Environments of verifiers 0.4: tasksets, the agents that play them, and their harnesses.

A harness is a program that asks the policy through a server of the library on loopback, which passes each request on to
the gateway and writes down what was said; the task's rewards read it there.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.runtimes import runtime_is_local
from verifiers.v1.utils.loaders import harness_class

from async_rl.rollout.environments.host import import_class
from async_rl.rollout.environments.instance import Failed, failure
from async_rl.rollout.environments.interface import PolicyAddress, Step, Task
from async_rl.rollout.environments.verifiers_programs import run_chat_programs_here

# Codes with which the gateway refuses a request at a limit of the run.
_NO_ROOM = ("context_length_exceeded", "rollout_budget_exceeded")

# What is in the environment under the name would be sent as the key; the gateway's is in its address.
_NO_KEY = "ASYNC_RL_NO_API_KEY"

_ARGS = "rollout.agent.arguments.args"


class Tasks:
    """An environment whose rollouts begin with a task of its taskset."""

    def __init__(self, name: str, env: Any, args: Mapping[str, Any], select: Mapping[str, Any]) -> None:
        self._name, self._env, self._args, self._select = name, env, args, select
        self._task_class = type(env.taskset).task_type()
        self._data_class = self._task_class.data_type()
        self._serving: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None

    def check(self) -> None:
        """Refuse what leaves this machine, runs there unasked, or makes a rollout twice. Raises Failed."""
        seats = {name: spec for name, spec in self._env.config if isinstance(spec, vf.AgentConfig)}
        harnesses = self._env.config.agent_harnesses()
        for seat, spec in seats.items():
            self._check_local(f"{_ARGS}.{seat}.runtime", spec.runtime)
            own = isinstance(spec.runtime, vf.SubprocessConfig) and "runtime" not in (self._args.get(seat) or {})
            harness = harnesses[seat].id
            if own and harness_class(harness).EXECUTES_CODE:
                raise Failed(
                    f"{self._name} has the harness {harness}, which runs what the policy says; set "
                    f"{_ARGS}.{seat}.runtime to {{type: docker}}, or to {{type: subprocess}} for this machine itself"
                )
            if spec.retries.max_retries or any(rule.max_retries for rule in spec.retries.rules):
                raise Failed(
                    f"{self._name} makes rollouts that fail once more, and both would be trained; set "
                    f"{_ARGS}.{seat}.retries to {{max_retries: 0, rules: []}}; rollout.agent.on_error has their twin"
                )
        config = self._env.taskset.config
        for toolset in (*self._task_class.toolsets(config.task), *type(self._env.taskset).toolsets(config)):
            if toolset.config.url is None:
                self._check_local(f"the runtime of its tools {type(toolset).__name__}", toolset.config.runtime)
        if lost := [name for name, field in self._data_class.model_fields.items() if field.exclude]:
            raise Failed(f"{self._name} has tasks with {', '.join(lost)}, which are in no row (exclude=True)")

    def _check_local(self, what: str, runtime: Any) -> None:
        if not runtime_is_local(runtime):
            raise Failed(
                f"{self._name} has {runtime.type} for {what}, which would reach the policy through a tunnel of Prime's "
                "servers; use one of subprocess, docker, podman and apptainer"
            )

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the tasks that ``select`` has for a split as rows; all of them for "train". Raises Failed."""
        if split != "train" and split not in self._select:
            raise Failed(
                f"{self._name} has one set of tasks; say which of them are for {split} in "
                f"rollout.agent.arguments.select.{split}, such as {{limit: 100}}, or set data.{split}"
            )
        tasks = self._env.taskset.select(vf.SelectConfig(**(self._select.get(split) or {})))
        if not tasks.bounded:
            raise Failed(f"{self._name} has tasks without end; set rollout.agent.arguments.select.{split}.limit")
        for task in tasks:
            # As text, since files of tables give each row all keys of all rows.
            yield {"prompt": _messages(task.data), "task": task.data.model_dump_json()}

    async def play(self, task: Task, policy: PolicyAddress) -> Step:
        """Have the library make the episode of a row. Raises Failed."""
        made = self._task(task.fields)
        await self._served()
        context = vf.ModelContext(
            model=policy.model, client=vf.EvalClientConfig(base_url=policy.base_url, api_key_var=_NO_KEY)
        )
        episode = await self._env.run_episode(made, context, on_trace=lambda trace: trace.watch(_stop_without_room))
        return self._outcome(episode, policy)

    def _task(self, fields: Mapping[str, Any]) -> Any:
        """Return the task of a row, made as the library makes one that it was sent. Raises Failed."""
        if not isinstance(written := fields.get("task"), str):
            raise Failed("got a row without its task; have rows written by prepare (docs/how-to/verifiers.md)")
        try:
            data = self._data_class.model_validate_json(written)
        except ValueError as error:
            raise Failed(f"got a row whose task is none of {self._name}: {error!s:.500}") from None
        return self._task_class(data, self._env.taskset.config.task)

    async def _served(self) -> None:
        """Bring up what all rollouts of this process share, once: tools of the taskset, and the environment's own."""
        if self._serving is None or self._serving.done():
            self._ready = asyncio.get_running_loop().create_future()
            self._serving = asyncio.create_task(self._serve(self._ready))
        assert self._ready is not None
        await asyncio.shield(self._ready)

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        try:
            async with self._env.serving():
                # Its servers that rollouts share keep a client for each address of the policy as long as they live, and
                # each rollout has an address of its own. Without them, each has a server of its own, and ends it.
                self._env._interception = None
                ready.set_result(None)
                await asyncio.Event().wait()
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(failure(error, "its start "))

    def _outcome(self, episode: Any, policy: PolicyAddress) -> Step:
        asked = [trace for trace in episode.traces if trace.agent.config.client.base_url == policy.base_url]
        if fixed := {trace.agent.name for trace in asked if not trace.agent.trainable}:
            seat = min(fixed)
            raise Failed(
                f"has the policy play {seat}, which is not to be trained; give it a model of its own with "
                f"{_ARGS}.{seat}.model and {_ARGS}.{seat}.client"
            )
        if episode.errors:
            raise _failed(episode.errors[-1])
        if not self._env.complete(episode):
            raise _failed(*(error for trace in episode.traces if not trace.ok for error in trace.errors[-1:]))
        if len(asked) != 1:
            names = ", ".join(sorted({trace.agent.name for trace in asked})) or "none"
            raise Failed(
                f"had the policy play {len(asked)} times in one episode ({names}), and a rollout has one reward; use "
                "an environment in which one agent plays once, or give the others models of their own"
            )
        return _step(asked[0])


def load(environment: str, args: dict[str, Any], select: dict[str, Any]) -> Tasks:
    """Return what the user's function makes, or the environment of a taskset. Raises Failed."""
    if unknown := sorted(set(select) - {"train", "eval"}):
        raise Failed(f"has rollout.agent.arguments.select.{unknown[0]}; there are train and eval")
    run_chat_programs_here()
    # Tools are modules that the library runs in processes: what a host can import, they can.
    own = (path for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix)))
    os.environ["PYTHONPATH"] = os.pathsep.join(own)
    if ":" in environment:
        made = import_class(environment)(**args)
        if not isinstance(made, vf.Env):
            raise Failed(f"{environment} returned a {type(made).__name__}; expected an Env of verifiers")
        args = {name: {"runtime": spec.runtime} for name, spec in made.config if isinstance(spec, vf.AgentConfig)}
    else:
        made = vf.load_environment(_config(environment, args))
    return Tasks(environment, made, args, select)


def _config(environment: str, args: Mapping[str, Any]) -> Any:
    """Return the configuration of a taskset's environment, with agents that run on this machine. Raises Failed."""
    tree = {**args, "taskset": {**(args.get("taskset") or {}), "id": environment}}
    kind = vf.env_config_type(environment, tree.get("id") or "")
    for name, field in kind.model_fields.items():
        if isinstance(field.default, vf.AgentConfig):
            tree[name] = _seat(field.default, tree.get(name) or {}, environment)
    return vf.resolve_env_config(tree)


def _seat(default: Any, given: Mapping[str, Any], environment: str) -> dict[str, Any]:
    """Return an agent's settings: the library's own defaults are a shell for the policy, in a sandbox of Prime's."""
    seat = dict(given)
    if default.harness is None:
        bundled = vf.default_harness_id(environment)
        seat["harness"] = {"id": "null" if bundled == "bash" else bundled, **(given.get("harness") or {})}
    if isinstance(default.runtime, vf.PrimeConfig) and "runtime" not in given:
        seat["runtime"] = {"type": "subprocess"}
    return seat


def _messages(data: Any) -> list[dict[str, Any]]:
    """Return what the policy is asked first, as far as it is known before the rollout."""
    prompt = data.prompt
    if prompt is None:
        prompt = data.description or data.name or f"task {data.idx}"
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [message_to_wire(m) for m in prompt]
    return asked if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}, *asked]


def _stop_without_room(trace: Any) -> None:
    """Stop a rollout whose last request was refused at a limit of the run: it is scored, whatever its harness does."""
    error = trace.calls[-1].error if trace.calls else None
    if error is not None and trace.stop_condition is None:
        for code in _NO_ROOM:
            if code in error.message:
                trace.stop(code)


def _failed(error: Any = None, *_: Any) -> Failed:
    if error is None:
        return Failed("ended with an episode that its environment calls incomplete")
    return Failed(f"ended with {error.type}: {error.message:.2000}", error.traceback or "")


def _step(trace: Any) -> Step:
    """Return what a rollout was worth. Raises Failed where it was not scored."""
    if unscored := sorted(name for name, reward in trace.rewards.items() if reward is None):
        raise Failed(f"was not scored: {', '.join(unscored)} ({trace.stop_condition})")
    if trace.stop_condition == "setup_timeout":
        raise Failed("was not set up in the time that timeout.setup gives it")
    no_room = trace.stop_condition in _NO_ROOM
    ends = {"timed_out": float(trace.is_timeout), "no_room": float(no_room)}
    scores = {name: reward.score for name, reward in trace.rewards.items()}
    metrics = {**ends, **scores, **{name: value for name, value in trace.metrics.items() if value is not None}}
    truncated = no_room or trace.is_timeout or trace.is_truncated
    return Step(reward=trace.reward, done=True, truncated=truncated, metrics=metrics)
