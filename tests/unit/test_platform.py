"""Which modules the trainer builds its model of."""

import pytest

from async_rl.trainer.megatron import platform


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [
        ("cuda", True, "transformer_engine"),
        ("cuda", False, "local"),
        ("cpu", True, "local"),
        ("cpu", False, "local"),
    ],
)
def test_layers_are_transformer_engines_on_gpus_where_it_is_installed(monkeypatch, device, installed, expected):
    monkeypatch.setattr(platform, "find_spec", lambda name: name if installed else None)
    assert platform.layout(device) == expected
