"""Combinations of settings of memory that cannot work, or of which one would silently do nothing.

Knows only the tree that it is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from async_rl.config.schema import RunConfig


def check_memory(config: RunConfig) -> None:
    """Raise ValueError for settings that contradict each other, naming them, their values and what to set."""
    trainer, optimizer = config.trainer, config.trainer.optimizer
    recompute = {"recompute_method": "uniform", "recompute_num_layers": 1}
    for key, default in recompute.items():
        if getattr(trainer, key) != default and trainer.recompute != "full":
            raise ValueError(
                f"trainer.{key} is {getattr(trainer, key)}, but trainer.recompute is {trainer.recompute}, which takes "
                f"no notice of it; set trainer.recompute to full, or {key} to {default}"
            )
    if optimizer.gradient_dtype != "float32" and config.model.dtype == "float32":
        raise ValueError(
            f"trainer.optimizer.gradient_dtype is {optimizer.gradient_dtype}, but model.dtype is float32, whose "
            "gradients are float32; set gradient_dtype to float32, or model.dtype to bfloat16"
        )
    lower = [key for key in ("first_moment_dtype", "second_moment_dtype") if getattr(optimizer, key) != "float32"]
    if lower and optimizer.offload_fraction:
        raise ValueError(
            f"trainer.optimizer.{lower[0]} is {getattr(optimizer, lower[0])}, but offload_fraction is "
            f"{optimizer.offload_fraction:g}, and moments in the host's memory are float32; set one of the two back"
        )
    if "attn_proj" in trainer.offload_activations and "core_attn" not in trainer.offload_activations:
        raise ValueError(
            "trainer.offload_activations has attn_proj without core_attn, whose output is that input; add core_attn"
        )
    if trainer.offload_activations and trainer.recompute == "full":
        raise ValueError(
            "trainer.offload_activations is set, but trainer.recompute is full, which keeps no activations of modules; "
            "set offload_activations to [], or trainer.recompute to none or selective"
        )
    if trainer.moe_dispatcher == "allgather" and trainer.parallel.pp > 1:
        raise ValueError(
            f"trainer.moe_dispatcher is allgather, which takes no microbatches of different lengths, but "
            f"trainer.parallel.pp is {trainer.parallel.pp}; set it to auto"
        )
    _check_shared_gpu(config)
    if config.resources.device == "cuda" and (fault := float32_over_contexts(config)) is not None:
        raise ValueError(f"trainer.parallel.cp is {fault}; set cp to 1, or model.dtype to bfloat16")
    if config.resources.device == "cpu" and (found := first_for_gpus(config)) is not None:
        key, _, instead = found
        raise ValueError(f"{key} is {refusal_on_cpu(found)}; set it to {instead}")


def _check_shared_gpu(config: RunConfig) -> None:
    sizes, rollout = config.trainer.parallel, config.rollout
    if not config.resources.share_gpu:
        return
    for key, value in (
        ("trainer.parallel", max(sizes.dp, sizes.tp, sizes.cp, sizes.pp)),
        ("rollout.replicas", rollout.replicas),
        ("rollout.tensor_parallel_size", rollout.tensor_parallel_size),
        ("rollout.data_parallel_size", rollout.data_parallel_size),
    ):
        if value != 1:
            raise ValueError(
                f"resources.share_gpu is true, with which one rank and one engine are on a GPU, but {key} is {value}; "
                "set share_gpu to false, or have one of each"
            )
    if "sglang" in rollout.engine_names:
        raise ValueError(
            f"resources.share_gpu is true, but {rollout.engine_setting} has sglang, which takes memory of what is free "
            "when it starts; set it to vllm, or share_gpu to false"
        )
    if config.sync.backend == "nccl":
        raise ValueError(
            "resources.share_gpu is true, but sync.backend is nccl, which takes no two processes on one GPU; set it to "
            "auto"
        )


def float32_over_contexts(config: RunConfig) -> str | None:
    """Return why a run on GPUs has no attention kernel; None if it has."""
    cp = config.trainer.parallel.cp
    if config.model.dtype != "float32" or cp == 1:
        return None
    return f"{cp}, but model.dtype is float32, for which no attention kernel on GPUs takes parts of sequences"


def first_for_gpus(config: RunConfig) -> tuple[str, object, object] | None:
    """Return (key, its value, what to set on a CPU) of a setting that works on GPUs alone; None without one."""
    trainer, optimizer = config.trainer, config.trainer.optimizer
    found: list[tuple[str, object, object]] = [
        ("trainer.optimizer.first_moment_dtype", optimizer.first_moment_dtype, "float32"),
        ("trainer.optimizer.second_moment_dtype", optimizer.second_moment_dtype, "float32"),
        ("trainer.optimizer.offload_fraction", optimizer.offload_fraction, 0.0),
        ("trainer.offload_activations", list(trainer.offload_activations), []),
        ("resources.share_gpu", config.resources.share_gpu, False),
        # vLLM 0.30 ends in its kernel for experts on CPUs where some of them are on another rank.
        (
            "rollout.engine_args.enable_expert_parallel",
            bool(config.rollout.engine_args.get("enable_expert_parallel", False)),
            False,
        ),
    ]
    if config.rollout.quantization not in (None, "fp8_per_channel"):
        found.append(("rollout.quantization", config.rollout.quantization, "fp8_per_channel"))
    if trainer.moe_dispatcher == "flex":
        found.append(("trainer.moe_dispatcher", "flex", "auto"))
    return next((each for each in found if each[1] != each[2]), None)


def refusal_on_cpu(setting: tuple[str, object, object]) -> str:
    """Return what is wrong with a setting of ``first_for_gpus`` in a run on a CPU, to follow its name."""
    return f"{setting[1]}, which works on GPUs alone, but the run computes on a CPU"
