"""The class that rollout.engine names: found, or refused with what to change."""

import pytest

from async_rl.config.loading import validate
from async_rl.doctor import inputs
from async_rl.errors import ConfigError
from async_rl.rollout.engine.loader import load_engine
from async_rl.rollout.engine.vllm.engine import VllmEngine
from tests.support.scripted_engine import ScriptedEngine

SCRIPTED = "tests.support.scripted_engine:ScriptedEngine"


class NotAnEngine:
    """Can be called as an engine is, and has one of its methods."""

    def __init__(self, config, replica, cores=None) -> None: ...

    async def start(self) -> None: ...


def test_engines_by_name():
    assert load_engine("vllm") is VllmEngine
    assert load_engine(SCRIPTED) is ScriptedEngine


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:Engine", "rollout.engine: 'nowhere:Engine': there is no module 'nowhere'"),
        ("tests.support.scripted_engine:Nothing", "has no function 'Nothing'"),
        ("tests.support.scripted_engine:lognormal", "cannot be called as"),
        (f"{__name__}:NotAnEngine", "lacks check_alive, .*generate.* of RolloutEngine"),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        load_engine(name)


def test_the_doctor_looks_at_the_engine_before_the_start():
    def checks(engine):
        tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "rollout": {"engine": engine}}
        return {check.name: check.status for check in inputs.functions(validate(tree))}

    assert checks(SCRIPTED)["rollout.engine"] == "ok"
    assert checks("nowhere:Engine")["rollout.engine"] == "FAIL"


def test_an_engine_without_a_module_is_refused_by_the_settings():
    with pytest.raises(ConfigError, match=r"rollout\.engine"):
        validate({"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "rollout": {"engine": "vlm"}})
