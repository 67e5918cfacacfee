"""Several agents in one run: which source or set has which, with limits, hosts and failures of its own."""

import json
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from structlog.testing import capture_logs

from async_rl.config.inputs import TRAIN
from async_rl.config.loading import load, parse_overrides, to_yaml, validate
from async_rl.config.paths import absolute
from async_rl.data import mixture, reading
from async_rl.data.mixture import MixtureCursor
from async_rl.doctor.cluster import user_modules
from async_rl.doctor.inputs import functions
from async_rl.driver.eval_command import table
from async_rl.driver.evaluation import EvalSet
from async_rl.errors import AgentFailure, ConfigError
from async_rl.metrics.evaluation import Answered, EvalRules, eval_line
from async_rl.metrics.exporter import Metrics
from async_rl.metrics.publish import publish_eval
from async_rl.observe.transcripts import headline
from async_rl.queue.records import Ticket
from async_rl.rollout.environments.play import Environments
from async_rl.rollout.outcome import Outcome
from async_rl.types import Prompt
from tests.support.datasets import TextEncoder
from tests.support.played import MODULE
from tests.support.scripted_replica import ListQueue, scripted, worker
from tests.unit.test_environment_hosts import TurnEngine, family

FUNCTION = {"function": "tests.support.user_agents:forks"}
WORLD = {"environment": f"{MODULE}:Wordless"}


def sources(**agents):
    return {name: {"path": f"{name}.jsonl", **({"agent": agent} if agent else {})} for name, agent in agents.items()}


def config(agents, sections=None, **named):
    """Return settings with these ``agents``, of which each source named here has one or None."""
    tree = {
        "model": {"path": "model"},
        "data": {"sources": sources(**named)} if named else {"train": "train.jsonl"},
        "rollout": {"agents": agents},
    }
    for key, value in (sections or {}).items():
        tree[key] = {**tree.get(key, {}), **value}
    return validate(tree)


# -- settings --


def test_a_source_is_played_by_its_agent_or_that_of_the_run_or_by_none():
    found = config({"a": FUNCTION}, math=None, code="a")
    assert {name: found.terms(name).agent for name in ("math", "code")} == {"math": None, "code": "rollout.agents.a"}
    single = {"rollout": {"agent": WORLD, "agents": {"a": FUNCTION}}}
    found = config({}, single, math=None, code="a")
    assert {found.terms("math").agent, found.terms(TRAIN).agent} == {"rollout.agent"}
    assert found.terms("code").agent == "rollout.agents.a"
    assert list(found.rollout.agent_sections) == ["rollout.agent", "rollout.agents.a"]
    between = {"rollout": {"environment": {"function": "my:turns"}, "agents": {"a": FUNCTION}}}
    found = config({}, between, math=None, code="a")
    assert (found.terms("math").environment, found.terms("code").environment) == ("my:turns", None)


def test_an_evaluation_set_names_its_own():
    sets = {"quiz": {"path": "q.jsonl"}, "game": {"path": "g.jsonl", "agent": "a", "max_response_tokens": 9}}
    found = config({"a": FUNCTION}, {"eval": {"sets": sets}})
    assert (found.eval_terms("quiz").agent, found.eval_terms("game").agent) == (None, "rollout.agents.a")
    assert found.eval_terms("game").max_response_tokens == 9


@pytest.mark.parametrize(
    ("agents", "sections", "named", "said"),
    [
        (
            {"a": FUNCTION},
            {},
            {"m": "b", "c": "a"},
            "data.sources.m.agent is b, but rollout.agents has none of this name; it is one of a",
        ),
        ({}, {}, {"m": "b"}, "has none of this name; it is one of none: set rollout.agents"),
        ({}, {"eval": {"sets": {"q": {"path": "q", "agent": "b"}}}}, {}, "eval.sets.q.agent is b, but rollout.agents"),
        (
            {"a": {"max_turns": 3}},
            {},
            {"m": "a"},
            "rollout.agents.a has settings of an agent, but names none; set rollout.agents.a.function",
        ),
        (
            {"a": FUNCTION, "b": FUNCTION},
            {},
            {"m": "a"},
            "rollout.agents.b plays nothing, because no source and no evaluation set names it",
        ),
        (
            {"a": {**FUNCTION, **WORLD}},
            {},
            {"m": "a"},
            "rollout.agents.a.function is tests.support.user_agents:forks, and rollout.agents.a.environment is",
        ),
        (
            {"a": {**WORLD, "inline": True, "python": "/p"}},
            {},
            {"m": "a"},
            "rollout.agents.a.python is /p, but rollout.agents.a.inline is true",
        ),
        (
            {"agent": FUNCTION},
            {},
            {"m": "agent"},
            "rollout.agents.agent: the name agent is that of rollout.agent in metrics",
        ),
        (
            {"a": FUNCTION},
            {"trainer": {"loss": {"advantage": "turn_return"}}},
            {"m": None, "c": "a"},
            "only agents return rewards of turns, and data.sources.m has no agent",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(agents, sections, named, said):
    with pytest.raises(ConfigError) as caught:
        config(agents, sections, **named)
    assert said in str(caught.value)


def test_a_source_has_an_agent_or_an_environment_between_turns_but_not_both():
    both = {"data": {"train": None, "sources": {"m": {"path": "m", "agent": "a", "environment": "my:turns"}}}}
    with pytest.raises(
        ConfigError, match=r"data\.sources\.m\.agent is a, and data\.sources\.m\.environment is my:turns"
    ):
        config({"a": FUNCTION}, both)


def test_rewards_are_for_what_no_agent_plays():
    right = {"function": "my:right", "applies_to": ["m"]}
    config({"a": FUNCTION}, {"reward": {"functions": {"right": right}}}, m=None, c="a")
    other = {"function": "my:other", "applies_to": ["c"]}
    with pytest.raises(
        ConfigError, match=r"reward\.functions\.other\.applies_to has c, but the agent a plays its rollouts"
    ):
        config({"a": FUNCTION}, {"reward": {"functions": {"right": right, "other": other}}}, m=None, c="a")
    with pytest.raises(ConfigError, match=r"none of reward\.functions \(right\) applies to b"):
        config({"a": FUNCTION}, {"reward": {"functions": {"right": right}}}, m=None, b=None, c="a")


def test_settings_of_one_are_changed_on_the_command_line_and_printed(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config({"a": {**WORLD, "python": "venv/bin/python"}}, m="a")))
    found = load(path, parse_overrides(["--rollout.agents.a.max_turns", "7", "--data.sources.m.agent=a"]))
    own = absolute(found).rollout.agents["a"]
    assert (own.max_turns, own.python.is_absolute()) == (7, True)
    assert "max_turns: 7" in to_yaml(found)


def test_a_resumed_run_says_which_source_has_another_agent(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(mixture, "log", SimpleNamespace(warning=lambda event, **fields: said.append((event, fields))))
    for name in "mc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a"}))

    def cursor(agents, **named):
        settings = config(agents, **named)
        paths = {
            name: each.model_copy(update={"path": tmp_path / each.path}) for name, each in settings.data.sources.items()
        }
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"sources": paths})})
        read = reading.read_train(settings, lambda key: reading.read(settings, key, TextEncoder(lambda text: [1])))
        return MixtureCursor(read, shuffle=True, seed=0)

    before = msgpack.unpackb(msgpack.packb(cursor({"a": WORLD}, m=None, c="a").state()))
    for agents, named, changed in (
        ({"a": WORLD}, {"m": None, "c": "a"}, None),
        ({"renamed": WORLD}, {"m": None, "c": "renamed"}, None),
        ({"a": {**WORLD, "max_turns": 3}}, {"m": None, "c": "a"}, ["c"]),
        ({"a": WORLD}, {"m": "a", "c": "a"}, ["m"]),
    ):
        said.clear()
        cursor(agents, **named).restore(before)
        assert said == ([] if changed is None else [("source_agents_changed", {"sources": changed})])
    del before["agents"]  # as earlier releases wrote it
    said.clear()
    cursor({"a": WORLD}, m="a", c="a").restore(before)
    assert said == []


def test_the_doctor_looks_at_each_by_its_name():
    agents = {
        "f": {"function": "no_such_module:f"},
        "p": {"command": ["no-such-program"]},
        "w": {**WORLD, "python": "/no/python"},
    }
    found = {check.name: check for check in functions(config(agents, m="f", c="p", g="w"))}
    keys = "rollout.agents.f.function", "rollout.agents.p.command", "rollout.agents.w.environment"
    assert [found[key].status for key in keys] == ["FAIL"] * 3
    assert "(rollout.agents.w.python) did not start" in found[keys[2]].detail
    modules = user_modules(config({**agents, "v": WORLD}, m="f", c="p", g="w", h="v"))
    assert modules["no_such_module"] == "rollout.agents.f.function"
    assert modules[MODULE] == "rollout.agents.v.environment", "the other is for an interpreter of its own"


def test_an_environment_names_the_settings_of_its_own_agent():
    agents = {"s": {"environment": f"{MODULE}:NoState", "recovery": "state", "inline": True}}
    with pytest.raises(AgentFailure) as refused:
        Environments(config(agents, m="s"), "rollout.agents.s")
    assert "which rollout.agents.s.recovery state calls; write them, or set rollout.agents.s.recovery" in str(
        refused.value
    )
    assert "rollout.agent." not in str(refused.value)


# -- in a worker --


class Tickets(ListQueue):
    """Its groups are of these prompts."""

    def __init__(self, *names):
        super().__init__(0)
        row = np.array([5, 6, 7], dtype=np.int32)
        self.waiting = [Ticket(f"{name}.0", Prompt(name, 1, "abc", row, {}), 0) for name in names]

    async def take(self, worker, limit):
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken

    def by_source(self):
        found = {}
        for group in self.groups:
            found.setdefault(group.group_id.partition("/")[0], []).append(group)
        return found


def replica(queue, agents, at_once=16, sets=None, **named):
    made = sources(**named)
    subject, digits = worker(
        scripted(kind=TurnEngine, sources=sources(**dict.fromkeys(named))),
        queue,
        data={"sources": made},
        rollout={"n": 2, "max_num_seqs": at_once, "max_response_tokens": 40, "agents": agents},
        eval={"sets": sets or {}},
    )
    digits.encode = lambda text, add_special_tokens=False: [90 + ord(c) % 10 for c in text]
    return subject


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"async_rl_{name}", labels) or 0


async def test_limits_hosts_and_failures_of_one_are_those_of_no_other(tmp_path, monkeypatch):
    """Two environments in hosts, of which one dies while the other waits for that, one here, and responses beside."""
    monkeypatch.setenv("ENVIRONMENTS_LOG", str(tmp_path / "log"))
    before = family()
    queue = Tickets("waits/0-0", "dies/0-1", "plain/0-0", "talks/0-0", "waits/0-1", "plain/0-1", "talks/0-1")
    agents = {
        "waits": {"environment": f"{MODULE}:WordlessWaits", "max_turns": 2, "hosts": 2},
        "dies": {"environment": f"{MODULE}:WordlessDies", "on_error": "skip"},
        "talks": {"environment": f"{MODULE}:Wordless", "inline": True, "concurrent": 1},
    }
    subject = replica(queue, agents, plain=None, **{name: name for name in agents})
    await subject.run()
    metrics = Metrics("rollout")
    subject._worker.agents.publish(metrics)
    await subject.shutdown()
    assert family() <= before
    assert queue.failed == [("dies/0-1.0", "agent")]
    found = queue.by_source()
    assert {name: len(groups) for name, groups in found.items()} == {"plain": 2, "talks": 2, "waits": 2}
    ends = {
        name: {(r.reward, r.end, sum(map(len, r.turns))) for group in groups for r in group.rollouts}
        for name, groups in found.items()
        if name != "plain"
    }
    assert ends == {"talks": {(3.0, "done", 3)}, "waits": {(2.0, "truncated", 2)}}
    assert {tuple(group.rewards) for group in found["plain"]} == {(6.0, 6.0)}, "scored by the reward of the settings"
    assert {t.sampled.all() for group in found["plain"] for t in group.trajectories} == {True}
    lost = {name: value(metrics, "agent_environment_hosts_lost_total", agent=name, reason="died") for name in agents}
    assert lost == {"waits": 0, "dies": 1, "talks": 0}
    assert value(metrics, "agent_rollouts_total", agent="waits", end="truncated") == 4
    assert value(metrics, "agent_rollouts_total", agent="talks", end="done") == 4
    assert value(metrics, "agent_rollouts_total", agent="dies", end="failed") >= 1
    assert value(metrics, "agent_turns_total", agent="talks", how="extended") == 4 * 2
    assert value(metrics, "agent_requests_refused_total", agent="waits", code="rollout_budget_exceeded") == 4
    assert value(metrics, "agent_rollout_seconds_total", agent="waits") > 0
    assert metrics.registry.get_sample_value("async_rl_agent_environments", {"agent": "waits"}) == 0


async def fails(prompt, policy, context):
    raise ValueError("no board")


async def answers(prompt, policy, context):
    """One turn; says which evaluation it is of."""
    reply = await policy.complete(prompt.token_ids)
    metrics = {"tokens": len(reply.token_ids), **({"row": prompt.row} if prompt.row > 1 else {})}
    return Outcome(1.0, metrics=metrics)


async def test_each_says_for_itself_whether_its_failures_end_the_run():
    agents = {
        "mild": {"function": f"{__name__}:fails", "on_error": "skip"},
        "strict": {"function": f"{__name__}:fails"},
    }
    queue = Tickets("mild/0-0", "plain/0-0")
    await replica(queue, agents, plain=None, mild="mild", strict="strict").run()
    assert (queue.failed, len(queue.groups)) == ([("mild/0-0.0", "agent")], 1)
    subject = replica(Tickets("strict/0-0", "plain/0-0"), agents, plain=None, mild="mild", strict="strict")
    with pytest.raises(
        AgentFailure, match=r"^rollout\.agents\.strict\.function \S+:fails, prompt strict/0-0 .*no board"
    ):
        await subject.run()


async def test_time_limits_are_those_of_the_agent():
    agents = {
        "late": {"environment": f"{MODULE}:WordlessHangs", "inline": True, "step_s": 0.05, "on_error": "skip"},
        "talks": {"environment": f"{MODULE}:Wordless", "inline": True, "step_s": 60.0},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ENVIRONMENTS_LOG", raising=False)
        queue = Tickets("late/0-0", "talks/0-0")
        subject = replica(queue, agents, late="late", talks="talks")
        with capture_logs() as lines:
            await subject.run()
        await subject.shutdown()
    assert (queue.failed, [group.group_id for group in queue.groups]) == ([("late/0-0.0", "agent")], ["talks/0-0.0"])
    (reason,) = [line["reason"] for line in lines if line["event"] == "group_failed"]
    assert "its step has not ended after 0.05 s (rollout.agents.late.step_s)" in reason


# -- evaluation, and what is shown --


async def test_a_set_is_answered_by_its_own_agent_and_its_metrics_are_means():
    agents = {"a": {"function": f"{__name__}:answers"}}
    sets = {"quiz": {"path": "q.jsonl"}, "game": {"path": "g.jsonl", "agent": "a", "k": 2}}
    subject = replica(ListQueue(0), agents, sets=sets, plain=None)
    rows = [Prompt(f"eval-{n}", n, "abc", np.array([5, 6, 7], np.int32)) for n in (1, 2, 3)]
    asked = {name: EvalSet.of(subject._config, name, rows) for name in sets}
    result = await subject.evaluate([problem for each in asked.values() for problem in each.problems])
    lines = {name: each.results([a for a in result.answers if a.set == name]) for name, each in asked.items()}
    assert (lines["quiz"]["avg"]["mean"], "metrics" in lines["quiz"]) == (6.0, False)
    assert (lines["game"]["avg"]["mean"], lines["game"]["metrics"]) == (1.0, {"row": 2.5, "tokens": 6.0})
    assert "game: row 2.5, tokens 6\n" in table(lines)
    metrics = Metrics("pipeline")
    publish_eval(metrics, lines["game"])
    assert value(metrics, "eval_metric_mean", set="game", metric="row") == 2.5


def test_results_without_agents_are_those_of_before():
    assert "metrics" not in eval_line("s", [Answered((1.0,), (3,), 0)], EvalRules(1, (1,), 1.0))


def test_a_rollout_is_shown_with_its_metrics():
    line = {"rollout": "0-1.0/0", "reward": 0.5, "metrics": {"turns": 3.0, "books": 0.123456}, "end": "done"}
    assert headline(line) == "rollout 0-1.0/0: reward 0.5, metrics turns 3, books 0.1235, done"
