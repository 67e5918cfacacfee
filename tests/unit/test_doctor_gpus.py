"""Doctor's checks of the GPUs that the driver names."""

import os

import pytest

from async_rl.config.loading import validate
from async_rl.doctor import gpus, machine
from async_rl.doctor.gpus import Gpu
from async_rl.errors import ConfigError
from tests.support.model_folders import QWEN3_30B_A3B, write_config
from tests.unit.test_model_config import DEEPSEEK_V3

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81_559 * 2**20)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81_920 * 2**20)
V100 = Gpu("Tesla V100", (7, 0), 32_768 * 2**20)


def settings(folder, model=QWEN3_30B_A3B, dtype="bfloat16", device="auto", rollout=(), **trainer):
    return validate(
        {
            "model": {"path": str(write_config(folder / "model", model)), "dtype": dtype},
            "data": {"train": "train.jsonl"},
            "resources": {"device": device},
            "rollout": dict(rollout),
            "trainer": trainer,
        }
    )


@pytest.fixture
def present(monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    monkeypatch.setattr(gpus, "installed_version", {"transformer-engine": "2.11.0"}.get)
    return lambda *found: monkeypatch.setattr(gpus, "found", lambda: list(found))


FITS = {"recompute": "full", "optimizer": {"offload_fraction": 1.0}, "parallel": {"dp": 16, "ep": 16}}


def test_what_the_drivers_program_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 81559'\necho 'NVIDIA A100, 8.0, 81920'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus.found() == [H100, Gpu("NVIDIA A100", (8, 0), 81_920 * 2**20)]
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert gpus.found() == []
    program.write_text("#!/bin/sh\necho '[N/A], [N/A], [N/A]'\n")
    assert gpus.found() == []


@pytest.mark.parametrize(
    ("gpu", "model", "flash", "fault"),
    [
        (H100, QWEN3_30B_A3B, None, None),
        (H100, DEEPSEEK_V3, None, None),
        (A100, QWEN3_30B_A3B, "2.8.0", None),
        (A100, QWEN3_30B_A3B, None, "capability 8.0, on which attention over packed sequences needs flash-attn"),
        (A100, DEEPSEEK_V3, "2.8.0", "attention over packed sequences (latent) needs 9.0"),
        (V100, QWEN3_30B_A3B, "2.8.0", "Tesla V100 has compute capability 7.0"),
    ],
)
def test_attention_over_packed_sequences(tmp_path, monkeypatch, present, gpu, model, flash, fault):
    monkeypatch.setattr(gpus, "installed_version", {"transformer-engine": "2.11.0", "flash-attn": flash}.get)
    present(gpu, H100)
    said = [each.detail for each in gpus.suitable(settings(tmp_path, model)) if each.status == "FAIL"]
    assert len(said) == (fault is not None)
    assert all(fault in each for each in said)


def test_without_transformer_engine_any_gpu_computes_and_doctor_says_how(tmp_path, monkeypatch, present):
    monkeypatch.setattr(gpus, "installed_version", lambda _: None)
    present(V100)
    layers, _ = gpus.suitable(settings(tmp_path, DEEPSEEK_V3))
    assert (layers.name, layers.status, layers.fix) == ("transformer-engine", "warn", "run make setup DEVICE=cuda")


def test_memory_of_a_rank_against_the_smallest_gpu(tmp_path, present):
    present(H100, Gpu("NVIDIA H200", (9, 0), 143_771 * 2**20))
    (small,) = gpus.suitable(settings(tmp_path, **FITS))
    assert (small.status, small.detail) == ("ok", "a trainer rank fits into 85 GB by estimate")
    (tmp_path / "other").mkdir()
    (large,) = gpus.suitable(settings(tmp_path / "other", **FITS | {"parallel": {}}))
    assert large.status == "warn"
    assert large.detail.startswith("85 GB: a trainer rank does not fit; ")


def test_float32_over_parts_of_sequences_has_no_kernel_on_gpus(tmp_path, present):
    cut = {"dtype": "float32", "parallel": {"cp": 2}}
    with pytest.raises(ConfigError, match=r"trainer\.parallel\.cp is 2, but model\.dtype is float32.*set cp to 1"):
        settings(tmp_path, device="cuda", **cut)
    present()
    (tmp_path / "other").mkdir()
    (check,) = gpus.suitable(settings(tmp_path / "other", **cut))
    assert (check.name, check.status, check.error) == ("trainer.parallel.cp", "FAIL", ConfigError)


def test_without_gpus_nothing_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    assert list(gpus.suitable(settings(tmp_path))) == []


@pytest.mark.parametrize(
    ("gpu", "kind", "status"),
    [
        (H100, "fp8_per_channel", None),
        (A100, "fp8_per_channel", "FAIL"),
        (A100, "fp8_per_block", "warn"),
        (A100, None, None),
    ],
)
def test_products_in_fp8(tmp_path, present, gpu, kind, status):
    present(H100, gpu)
    checks = gpus.suitable(settings(tmp_path, rollout={"quantization": kind}))
    said = [each for each in checks if each.name == "rollout.quantization"]
    assert [each.status for each in said] == ([] if status is None else [status])
    assert all(f"{kind}, but {gpu.name} has compute capability 8.0" in each.detail for each in said)
