"""Combinations of settings of agents, and of the sources and sets that name them, that cannot work; see ``checks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_rl.config.rollouts import AGENT, agent_name, agent_section

if TYPE_CHECKING:
    from async_rl.config.inputs import EvalSetSection, SourceSection
    from async_rl.config.rollouts import AgentSection
    from async_rl.config.schema import RunConfig


def check_agents(config: RunConfig) -> None:
    """Raise ValueError for settings that contradict each other, naming them, their values and what to set."""
    rollout = config.rollout
    _check_agent(AGENT, rollout.agent)
    for name, agent in rollout.agents.items():
        section = agent_section(name)
        if name == agent_name(AGENT):
            raise ValueError(f"{section}: the name {name} is that of {AGENT} in metrics; choose another")
        if not agent.given:
            raise ValueError(
                f"{section} has settings of an agent, but names none; set {section}.function, command or environment, "
                "or remove it"
            )
        _check_agent(section, agent)
    _check_users(config)
    _check_turn_rewards(config)


def _check_agent(section: str, agent: AgentSection) -> None:
    if len(agent.given) > 1:
        both = ", and ".join(f"{section}.{key} is {value}" for key, value in agent.given.items())
        raise ValueError(f"{both}, but a rollout has one agent; remove one of them")
    if agent.inline and agent.python is not None:
        raise ValueError(
            f"{section}.python is {agent.python}, but {section}.inline is true, so that environments run under the "
            "worker's Python; remove one of them"
        )
    if agent.recovery != "restart" and agent.environment is None:
        found = next((f"{section}.{key} is {value}" for key, value in agent.given.items()), "no environment is set")
        raise ValueError(
            f"{section}.recovery is {agent.recovery}, but {found}, and only an environment can be recovered; set it to "
            "restart"
        )


def _check_users(config: RunConfig) -> None:
    """Raise ValueError where a source or set has no such agent or also an environment, or where none has an agent."""
    agents, users = config.rollout.agents, _users(config)
    for key, each in users.items():
        if each.agent is None:
            continue
        if each.agent not in agents:
            raise ValueError(
                f"{key}.agent is {each.agent}, but rollout.agents has none of this name; it is one of "
                f"{', '.join(agents) or 'none: set rollout.agents'}"
            )
        if each.environment is not None:
            raise ValueError(
                f"{key}.agent is {each.agent}, and {key}.environment is {each.environment}, but an agent answers the "
                "policy itself; remove one of them"
            )
    named = {each.agent for each in users.values()}
    if unused := next((name for name in agents if name not in named), None):
        raise ValueError(
            f"{agent_section(unused)} plays nothing, because no source and no evaluation set names it; set "
            f"data.sources.NAME.agent or eval.sets.NAME.agent to {unused}, or remove it"
        )
    for key, value in config.rollout.agent.given.items():
        others = {"rollout.environment.function": config.rollout.environment.function}
        others |= {f"{user}.environment": each.environment for user, each in users.items()}
        if found := next(((other, function) for other, function in others.items() if function is not None), None):
            raise ValueError(
                f"{AGENT}.{key} is {value}, and {found[0]} is {found[1]}, but an agent answers the policy itself; "
                "remove one of them"
            )


def _check_turn_rewards(config: RunConfig) -> None:
    if config.trainer.loss.advantage != "turn_return":
        return
    without = [name for name in config.data.sources or [""] if config.terms(name).agent is None]
    if without:
        where = f"data.sources.{without[0]} has no agent" if without[0] else f"{AGENT} names none"
        raise ValueError(
            f"trainer.loss.advantage is turn_return, but only agents return rewards of turns, and {where}; set "
            f"{AGENT}.function or command, or another advantage"
        )


def _users(config: RunConfig) -> dict[str, SourceSection | EvalSetSection]:
    """Return what may name an agent, by its section."""
    sources = {f"data.sources.{name}": each for name, each in config.data.sources.items()}
    return sources | {f"eval.sets.{name}": each for name, each in config.eval.sets.items()}
