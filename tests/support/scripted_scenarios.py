"""Engines with a script of their own, for runs that name one as ``rollout.engine``."""

from tests.support.scripted_engine import Script, ScriptedEngine, lognormal


class InstantEngine(ScriptedEngine):
    """An engine that has a whole response at once, so that groups always wait for the trainer and become stale."""

    script = Script(length=lognormal(40), tokens_per_turn=1024)
