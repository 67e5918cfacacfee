"""Which modules the trainer builds its model of, and how much of a GPU's memory it may take."""

from types import SimpleNamespace

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


@pytest.mark.parametrize(("share", "fraction"), [(0.0, None), (0.28, 0.72 - 0.025)])
def test_the_trainer_leaves_an_engine_on_its_gpu_the_engines_share(monkeypatch, share, fraction):
    bounds = []
    cuda = SimpleNamespace(
        set_device=lambda _: None,
        get_device_properties=lambda _: SimpleNamespace(total_memory=80 * 10**9),
        set_per_process_memory_fraction=bounds.append,
    )
    monkeypatch.setattr(platform.torch, "cuda", cuda)
    monkeypatch.setattr(platform, "_patch_pipeline_shapes", lambda: None)
    monkeypatch.setattr(platform, "_patch_transformer_engine", lambda: None)
    platform.activate("cuda", share)
    assert bounds == ([] if fraction is None else [pytest.approx(fraction)])
