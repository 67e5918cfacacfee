"""How the vLLM processes are set up: environment, engine arguments. The one place that names them, with reasons.

Call ``prepare`` before anything imports vLLM: it reads most of this at import, and its engine core inherits the rest.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_rl.config.schema import RunConfig
from async_rl.errors import EngineError, ModelError
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.device import on_cpu
from async_rl.rollout.engine.interface import EngineLoad, Part
from async_rl.runtime import logs
from async_rl.runtime.interfaces import use_interface
from async_rl.runtime.numa import near_gpus
from async_rl.weights.vllm.plugin import ENGINE_PROCESSES

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

# vllm_engine and weights.shm reach into vLLM where it has no public way; they were written for this version.
VLLM_VERSION = "0.30."

ENVIRONMENT = {
    # Models come from a folder; nothing is looked up or reported over the network.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # vLLM would give its loggers a handler on stdout; without it they follow the root logger of the process.
    "VLLM_CONFIGURE_LOGGING": "0",
    # The semaphores of an engine core that was killed are removed by Python's resource tracker, with a warning.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
    # Outputs that the frontend takes in one turn of its event loop, for which vLLM copies their routed experts: when a
    # weight sync ends hundreds of calls of 16k tokens, vLLM's 128 keep the loop for a tenth of a second.
    "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "32",
}


# By default the processes of an engine on one host would wait for each other at the host's address, which others reach:
# those of its process groups, and whatever vLLM opens at "the host's address".
ON_ONE_HOST = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


def prepare(config: RunConfig, model: ModelConfig, part: Part | None = None) -> None:
    """Set this process up so that vLLM, imported and started from it, does what ``config.resources`` says.

    ``part`` is that of this host, of an engine over several.
    """
    os.environ.update(ENVIRONMENT)
    if part is None:
        os.environ.update(ON_ONE_HOST)
    else:
        os.environ["VLLM_HOST_IP"] = part.address
        use_interface(config.cluster.interface, part.meeting[0], os.environ)
    if not on_cpu(config):
        return
    threads = str(config.resources.engine_threads)
    os.environ["OMP_NUM_THREADS"] = threads
    # Placement is the affinity that the engine core inherits; vLLM's own binding would choose cores by itself.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if config.rollout.engine_ranks == 1:
        # Lets the model run inside the engine core (AsyncLLM has a process for that all the same) instead of in a
        # third process, which costs a hop over shared memory each step.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if _eager(config, model):
        # vLLM compiles two functions of its sampler all the same. On a CPU their guards cost more than they save (6 %
        # of the time per token), and compiling them four seconds of each start.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def why_not_started(config: RunConfig, role: str, error: Exception, since: Mapping[Path, int]) -> str:
    """Return why the engine did not start: where vLLM refers to its engine core, what that one logged.

    since: the engine processes' logs before the start, by ``logs.children_logs``.
    """
    if "root cause" not in str(error):
        return str(error)
    fault = logs.children_fault(config.run_dir, role, since)
    if fault is None:
        return (
            f"{error} The engine core logged no exception: it was killed, for lack of memory for example, or ended by "
            "a library; its last words are in the worker-*.err files of Ray's session (/tmp/ray/session_latest/logs)"
        )
    cause, path = fault
    return f"{cause} (log: {path})"


def kill_engine_processes() -> None:
    """Kill the engine cores, or ranks, that were started from this process: vLLM then says that its engine has died.

    A rank may wait for one of another host that has ended, and does not hear anything else.
    """
    for child in multiprocessing.active_children():
        if child.name.startswith(ENGINE_PROCESSES):
            child.kill()


def _eager(config: RunConfig, model: ModelConfig) -> bool:
    # Compiled for a CPU, vLLM 0.30 traces the model before the capture of routed experts is hooked in, and then
    # returns all-zero routing. On a GPU the MoE layer is one opaque operator, and capture happens inside it.
    return config.rollout.enforce_eager or (on_cpu(config) and model.routing_spec is not None)


def _gpu_nodes(config: RunConfig) -> list[int] | None:
    """Return the NUMA node of each of the engine's GPUs, for vLLM to bind each of its processes and their memory.

    None where that is unknown, with data-parallel ranks, and without the program numactl, by which vLLM does it: its
    processes then inherit the cores near all of the engine's GPUs.
    """
    near = near_gpus(config.resources)
    if near is None or shutil.which("numactl") is None or config.rollout.data_parallel_size > 1:
        return None  # vLLM 0.30 numbers the GPUs of each data-parallel rank from 0
    return list(near.nodes)


def _quantization(config: RunConfig) -> dict[str, Any]:
    """Return what makes vLLM convert weights while it loads them, the first time and at each push."""
    kind = config.rollout.quantization
    if kind is None:
        return {}
    # Routers are small, and an expert that is chosen otherwise costs more than what they save. On CPUs vLLM's kernel
    # for experts in fp8 takes AMX, and which processor a host has must not decide what is sampled.
    layers = {"linear": kind} if on_cpu(config) else {"linear": kind, "moe": kind}
    return {"quantization": "online", "quantization_config": layers | {"ignore": ["*.gate"]}}


def engine_args(config: RunConfig, replica: int, model: ModelConfig, part: Part | None = None) -> AsyncEngineArgs:
    """Return the arguments of the vLLM engine, or of its ``part`` on this host.

    Raises EngineError when another version of vLLM is installed.
    """
    import vllm
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    from async_rl.weights.vllm.plugin import BACKENDS

    if not vllm.__version__.startswith(VLLM_VERSION):
        raise EngineError(f"vLLM {vllm.__version__} is installed, and this package was written for {VLLM_VERSION}x")
    nodes = _gpu_nodes(config)
    sets_cache, cache = on_cpu(config) or config.resources.share_gpu, config.rollout.kv_cache_bytes
    arguments: dict[str, Any] = {
        "model": str(config.model.path),
        "dtype": config.engine_dtype,
        **_quantization(config),
        "kv_cache_dtype": config.rollout.kv_cache_dtype or "auto",
        "trust_remote_code": config.model.trust_remote_code,
        # One stream of random numbers per replica and data-parallel rank (``WorkerExtension.seed_by_rank``). Requests
        # carry no seed: a resumed one must not replay its stream.
        "seed": config.seed + replica * config.rollout.data_parallel_size,
        "max_model_len": config.data.max_prompt_tokens + config.longest_response,
        "max_num_seqs": config.rollout.places_per_rank,
        "max_num_batched_tokens": config.rollout.max_num_batched_tokens,
        "tensor_parallel_size": config.rollout.tensor_parallel_size,
        # In a Ray actor that is in a placement group vLLM would choose Ray, and spread one engine over actors.
        "distributed_executor_backend": "mp" if config.rollout.engine_ranks > 1 else None,
        "data_parallel_size": config.rollout.data_parallel_size,
        **({} if part is None else _among(config, part)),
        # What vLLM would measure on a shared GPU is also what the trainer takes meanwhile.
        "kv_cache_memory_bytes": cache // config.rollout.data_parallel_size if sets_cache else None,
        "gpu_memory_utilization": config.rollout.gpu_memory_utilization,
        "numa_bind": nodes is not None,
        "numa_bind_nodes": nodes,
        "enforce_eager": _eager(config, model),
        "enable_prefix_caching": True,
        "enable_return_routed_experts": model.routing_spec is not None and config.rollout.return_routed_experts,
        # Behaviour log-probs: after temperature and top-p.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=BACKENDS[config.sync_backend]),
        # More methods on the worker; without a call of them nothing is hooked into the model.
        "worker_extension_cls": "async_rl.weights.vllm.extension.WorkerExtension",
        # Token ids in, token ids out. Sampling is what each request says, nothing from generation_config.json.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": not config.metrics.engine,
        "enable_log_requests": False,
    }
    return AsyncEngineArgs(**(arguments | config.rollout.engine_args))


def _among(config: RunConfig, part: Part) -> dict[str, Any]:
    """Return what tells vLLM's multiprocessing executor that its ranks are on several hosts."""
    host, port = part.meeting
    hosts = config.rollout.hosts_per_engine
    return {"nnodes": hosts, "node_rank": part.number, "master_addr": host, "master_port": port}


def stat_loggers(config: RunConfig) -> list[type] | None:
    """For AsyncLLM instead of its own: the same metrics at less cost to the event loop. None unless metrics.engine."""
    if not config.metrics.engine:
        return None
    from async_rl.rollout.engine.vllm.stats import BatchedStatLogger

    # At INFO it would keep the figures of its own log besides, which is written by vLLM's server only.
    logging.getLogger("vllm.v1.metrics.loggers").setLevel(logging.WARNING)
    return [BatchedStatLogger]


def load(llm: AsyncLLM) -> EngineLoad:
    """Return what vLLM's engine has to do, by what its scheduler said after its last step."""
    cache = llm.vllm_config.cache_config
    logger = llm.logger_manager.stat_loggers[0] if llm.logger_manager is not None else None
    ranks = getattr(logger, "last", {}).values()
    return EngineLoad(
        waiting=sum(stats.num_waiting_reqs + stats.num_skipped_waiting_reqs for stats in ranks),
        kv_use=sum(stats.kv_cache_usage for stats in ranks) / llm.vllm_config.parallel_config.data_parallel_size,
        kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
    )


def check_layout(hf_config: Any, model: ModelConfig) -> None:
    """Raise ModelError unless the engine read the layout from its config that the trainer builds.

    They read the same file, each in its own way, and routing means nothing where they disagree.
    """

    def engine_has(*names: str) -> Any:
        # A dense architecture has none of these.
        return next((value for name in names if (value := getattr(hf_config, name, None)) is not None), 0)

    pairs = {
        "layers": (engine_has("num_hidden_layers"), model.num_layers),
        "experts": (engine_has("num_experts", "num_local_experts", "n_routed_experts"), model.num_experts),
        "experts per token": (engine_has("num_experts_per_tok"), model.top_k),
    }
    unlike = [f"{name} ({a} in the engine, {b} in the trainer)" for name, (a, b) in pairs.items() if a != b]
    if unlike:
        raise ModelError(f"engine and trainer read different layouts from the checkpoint: {', '.join(unlike)}")
