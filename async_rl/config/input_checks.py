"""Combinations of settings of prompts, rewards and evaluation that cannot work; see ``checks``."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from async_rl.config.inputs import TRAIN

if TYPE_CHECKING:
    from pathlib import Path

    from async_rl.config.fields import DataFiles
    from async_rl.config.schema import RunConfig


def check_inputs(config: RunConfig) -> None:
    """Raise ValueError for settings that contradict each other, naming them, their values and what to set."""
    _check_reward(config)
    _check_data(config)
    _check_eval(config)


def _check_reward(config: RunConfig) -> None:
    reward = config.reward
    default = type(reward).model_fields["function"].default
    if reward.functions and (reward.function != default or reward.arguments):
        key = "arguments" if reward.function == default else "function"
        raise ValueError(
            f"reward.{key} is set beside reward.functions ({', '.join(reward.functions)}), which stand in its place; "
            f"move it into reward.functions, or remove one of the two"
        )
    for key, limit in _response_limits(config).items():
        if reward.overlong_tokens > limit:
            raise ValueError(
                f"reward.overlong_tokens is {reward.overlong_tokens}, more than {key} ({limit}), below which they are "
                "counted; set it to less"
            )
    _check_reward_names(config)


def _check_reward_names(config: RunConfig) -> None:
    """Raise ValueError where a reward scores what is not there, or nothing scores a source or set."""
    functions = config.reward.functions
    sources, sets = list(config.data.sources) or [TRAIN], list(config.eval_sets)
    own = {name: each.agent for name, each in config.data.sources.items() if each.agent is not None}
    own |= {name: each.agent for name, each in config.eval.sets.items() if each.agent is not None}
    for name, each in functions.items():
        if unknown := [of for of in each.applies_to or () if of not in (*sources, *sets)]:
            raise ValueError(
                f"reward.functions.{name}.applies_to has {unknown[0]}, but no source and no evaluation set has this "
                f"name; it is one of {', '.join(dict.fromkeys((*sources, *sets)))}"
            )
        if played := [of for of in each.applies_to or () if of in own]:
            raise ValueError(
                f"reward.functions.{name}.applies_to has {played[0]}, but the agent {own[played[0]]} plays its "
                f"rollouts, and says itself what they are worth; remove {played[0]} from applies_to"
            )
    terms = [config.terms(of) for of in sources]
    terms += [config.eval_terms(of) for of in sets]
    for of in [each.name for each in terms if each.agent is None] if functions else ():
        if not any(each.applies_to is None or of in each.applies_to for each in functions.values()):
            raise ValueError(
                f"none of reward.functions ({', '.join(functions)}) applies to {of}, so its responses would have no "
                "reward; add it to applies_to of one of them"
            )


def _response_limits(config: RunConfig) -> dict[str, int]:
    """Return the limits of responses in training, by the settings that name them."""
    own = {f"data.sources.{name}.max_response_tokens": each for name, each in config.data.sources.items()}
    limits = {key: each.max_response_tokens for key, each in own.items() if each.max_response_tokens is not None}
    return {"rollout.max_response_tokens": config.rollout.max_response_tokens, **limits}


def _check_data(config: RunConfig) -> None:
    data = config.data
    if data.train is None and not data.sources:
        raise ValueError(
            "data.train is not set, nor is data.sources: there are no prompts to train on; set one of them"
        )
    if data.train is not None and data.sources:
        raise ValueError(
            f"data.train is set beside data.sources ({', '.join(data.sources)}), which stand in its place; give it a "
            "name and a weight in data.sources, or remove one of the two"
        )
    if unused := next((name for name, source in data.sources.items() if source.weight == 0), None):
        raise ValueError(
            f"data.sources.{unused}.weight is 0, so that none of its prompts would be issued; set it above 0, or "
            f"remove {unused} from data.sources"
        )
    longest = config.rollout.max_response_tokens
    for key, limit in _response_limits(config).items():
        if limit > longest:
            raise ValueError(
                f"{key} is {limit}, more than rollout.max_response_tokens ({longest}), by which memory is planned; "
                "raise that, and set the limits of the other sources"
            )
    train = {"data.train": data.train} if data.train is not None else {}
    train |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    evals = {"data.eval": data.eval} | {f"eval.sets.{name}.path": each.path for name, each in config.eval.sets.items()}
    for (eval_key, held_out), (key, value) in itertools.product(evals.items(), train.items()):
        if both := [path for path in _as_list(held_out) if path in _as_list(value)]:
            raise ValueError(
                f"{eval_key} and {key} are the same file, {both[0]}; set {eval_key} to a file of other problems"
            )


def _check_eval(config: RunConfig) -> None:
    if "held_out" in config.eval.sets:
        raise ValueError("eval.sets.held_out: the name held_out is that of the problems of data.eval; choose another")
    for name, each in config.eval.sets.items():
        key, file = f"eval.sets.{name}", ", ".join(map(str, _as_list(each.path)))
        if (largest := max(each.pass_k or [0])) > each.k:
            raise ValueError(
                f"{key} ({file}): pass_k asks for pass@{largest}, but k is {each.k}, the responses per problem; set "
                f"{key}.k to at least {largest}"
            )
        if each.temperature == 0 and each.k > 1:
            raise ValueError(
                f"{key} ({file}): k is {each.k}, but temperature is 0, which gives {each.k} times the same response; "
                f"set {key}.k to 1, or {key}.temperature above 0"
            )
    _check_keep_best(config)


def _check_keep_best(config: RunConfig) -> None:
    best = config.checkpoint.keep_best
    if best is None:
        return
    sets = config.eval_sets
    if best not in sets:
        raise ValueError(
            f"checkpoint.keep_best is {best}, but no evaluation set has this name; it is one of "
            f"{', '.join(sets) or 'none: set data.eval or eval.sets'}"
        )
    every = config.eval.every if sets[best].every is None else sets[best].every
    if not every or not config.checkpoint.periodic:
        missing = "checkpoint.every" if every else "eval.every"
        raise ValueError(
            f"checkpoint.keep_best is {best}, but {missing} is 0, so no checkpoint of an evaluated step would be "
            f"written; set {missing}"
        )


def _as_list(files: DataFiles | None) -> list[Path]:
    return files if isinstance(files, list) else [] if files is None else [files]
