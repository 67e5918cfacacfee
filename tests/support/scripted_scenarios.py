"""Engines with a script of their own, for runs that name one as ``rollout.engine``."""

from async_rl.types import Int32Array
from tests.support.scripted_engine import Fault, Script, ScriptedEngine, lognormal


class InstantEngine(ScriptedEngine):
    """An engine that has a whole response at once, so that groups always wait for the trainer and become stale."""

    script = Script(length=lognormal(40), tokens_per_turn=1024)


class SlowEngine(ScriptedEngine):
    """An engine whose responses take about a second, so that groups are in flight at every moment."""

    script = Script(length=lognormal(40), tokens_per_turn=4, turn_s=0.1)


class LongDyingEngine(ScriptedEngine):
    """An engine whose responses outlast a training step, and which dies once on the first replica."""

    script = Script(length=96, tokens_per_turn=4, turn_s=0.1, fault=Fault("die", after_tokens=1000))


class LongDyingTurnsEngine(LongDyingEngine):
    """The same with turns: one ends at each multiple of 24 tokens of a response."""

    def last_position(self, trajectory_id: str, response: Int32Array) -> int:
        del trajectory_id
        return len(response) // 24 * 24 + 23


class DyingTurnsEngine(ScriptedEngine):
    """An engine that never stops of itself, as agents limit their turns, and which dies once on the first replica."""

    script = Script(length=1_000_000, tokens_per_turn=2, turn_s=0.1, fault=Fault("die", after_tokens=800))
