"""The agents of one worker, rollout.agent and rollout.agents, by the prompts that they play."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from async_rl.config.inputs import Terms
from async_rl.config.schema import RunConfig
from async_rl.metrics.exporter import Metrics
from async_rl.rollout.agent import Agent, context_tokens
from async_rl.rollout.calls import EngineCalls
from async_rl.rollout.chat import Chat, shared_turns
from async_rl.rollout.gate import Gate
from async_rl.rollout.responses import Responses
from async_rl.runtime.addresses import address_towards
from async_rl.types import Prompt

if TYPE_CHECKING:
    from async_rl.rollout.gateway.server import Gateway

_T = TypeVar("_T")


class Agents:
    """The agents of one worker; none where the settings name none."""

    def __init__(self, config: RunConfig, responses: Responses, calls: EngineCalls, gate: Gate, tokenizer: Any) -> None:
        """Load the functions that the settings name. Raises AgentFailure."""
        self.gateways: dict[str, Gateway] = {}
        """By the address that they listen on."""
        self._responses = responses
        self._agents: dict[str, Agent] = {}
        turns = shared_turns(config)
        for section, settings in config.rollout.agent_sections.items():
            if (host := settings.gateway_host) not in self.gateways:
                self.gateways[host] = _gateway(config, section, tokenizer)
            chat = Chat(turns, tokenizer, settings.tool_parser, f"{section}.tool_parser")
            self._agents[section] = Agent(config, section, responses, calls, gate, tokenizer, chat, self.gateways[host])

    def __getitem__(self, section: str) -> Agent:
        return self._agents[section]

    def of(self, terms: Terms) -> Agent | None:
        """Return the agent that plays the rollouts of a source or set; None where these are responses."""
        return None if terms.agent is None else self._agents[terms.agent]

    def of_prompt(self, prompt: Prompt) -> Agent | None:
        """Return the agent that plays a prompt's rollouts in training; None where these are responses."""
        return self.of(self._responses.terms(prompt))

    def plays(self, prompt: Prompt) -> bool:
        """Return whether an agent plays a prompt's rollouts in training."""
        return self.of_prompt(prompt) is not None

    async def start(self) -> None:
        """Start what the agents need, so that what is wrong with one is known at once. Raises AgentFailure."""
        for agent in self._agents.values():
            await agent.start()

    def publish(self, metrics: Metrics) -> None:
        """Bring the counters of agents on /metrics up to date."""
        for agent in self._agents.values():
            agent.publish(metrics)
        gateways = self.gateways.values()
        for (endpoint, code), requests in _sum(gateway.requests for gateway in gateways).items():
            metrics.count_to("gateway_requests_total", requests, endpoint=endpoint, code=str(code))
        for name, requests in _sum(gateway.ignored for gateway in gateways).items():
            metrics.count_to("gateway_fields_ignored_total", requests, field=name)
        if gateways:
            metrics.count_to("gateway_requests_joined_total", sum(gateway.joined for gateway in gateways))

    async def close(self) -> None:
        """End what agents run in, and serve no policy any longer."""
        await asyncio.gather(*(agent.close() for agent in self._agents.values()))
        for gateway in self.gateways.values():
            await gateway.close()


def _gateway(config: RunConfig, section: str, tokenizer: Any) -> Gateway:
    # A server for HTTP, which doctor and workers without agents have no use for.
    from async_rl.rollout.gateway.server import Gateway

    joined = config.cluster.joined_address
    return Gateway(
        config.rollout.agent_sections[section].gateway_host,
        None if joined is None else address_towards(joined),
        config.model.path.name,
        context_tokens(config),
        tokenizer,
        f"{section}.gateway_host",
    )


def _sum(counters: Iterable[Counter[_T]]) -> Counter[_T]:
    found: Counter[_T] = Counter()
    for each in counters:
        found.update(each)
    return found
