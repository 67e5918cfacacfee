"""Functions that settings name: those that moved are found under their old names for one release."""

import importlib
from pathlib import Path

import pytest
import structlog.testing

from async_rl.config.functions import MOVED_MODULES, load_function
from async_rl.config.loading import load
from async_rl.demo.prepare import prepare
from async_rl.errors import ConfigError

OLD_CONFIG = Path(__file__).with_name("config_of_release_0_1.yaml")
"""The config.yaml that release 0.1 wrote into the run folder of its demo, which --resume and export read again."""


def test_a_moved_function_of_an_old_run_folder_is_found_with_a_warning():
    config = load(OLD_CONFIG)
    assert config.prepare == "async_rl.tiny.prepare:prepare"
    with structlog.testing.capture_logs() as logs:
        assert load_function("prepare", config.prepare, ("config",), ConfigError) is prepare
    (entry,) = logs
    assert entry == {
        "event": "moved_function_name",
        "log_level": "warning",
        "setting": "prepare",
        "old": "async_rl.tiny.prepare:prepare",
        "new": "async_rl.demo.prepare:prepare",
    }


def test_a_current_name_is_found_without_a_warning():
    with structlog.testing.capture_logs() as logs:
        assert load_function("prepare", "async_rl.demo.prepare:prepare", ("config",), ConfigError) is prepare
    assert logs == []


@pytest.mark.parametrize("old", MOVED_MODULES)
def test_every_old_module_is_gone_and_its_new_place_exists(old):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(old)
    assert importlib.util.find_spec(MOVED_MODULES[old]) is not None


def test_a_function_that_is_nowhere_names_the_setting_and_the_module():
    with pytest.raises(ConfigError, match=r"^prepare: 'no\.such:f': there is no module 'no'; .* PYTHONPATH"):
        load_function("prepare", "no.such:f", ("config",), ConfigError)
