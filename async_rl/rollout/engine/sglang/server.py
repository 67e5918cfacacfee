"""SGLang's server as a process of this one: its arguments, its start, its end. Written for SGLang 0.5.23."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

import async_rl
from async_rl.config.schema import RunConfig
from async_rl.errors import EngineDied, EngineError
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.device import on_cpu
from async_rl.rollout.engine.sglang import versions
from async_rl.rollout.stats import worker_id
from async_rl.runtime.addresses import hold_port
from async_rl.runtime.process import run_token, starting_on

LOADER = "async_rl.weights.sglang.load"

_LOOK_S = 0.2

# The server takes no prompt that fills its context to the last token; see its tp_worker and scheduler.
_MARGIN = 8

_ENVIRONMENT = {
    # Models come from a folder; nothing is looked up over the network.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Positions are those of the model; the margin above is never reached.
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    # What the processes of one server open between them stays on this host.
    "GLOO_SOCKET_IFNAME": "lo",
    "SGLANG_HOST_IP": "127.0.0.1",
}

_ON_CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # The router of GLM-4 MoE is compiled otherwise, in twenty seconds of the first prefill.
    "TORCHDYNAMO_DISABLE": "1",
}


def arguments(config: RunConfig, replica: int, model: ModelConfig, port: int) -> list[str]:
    """Return the arguments of the server."""
    rollout = config.rollout
    given: dict[str, Any] = {
        "model-path": config.model.path,
        "dtype": config.engine_dtype,
        "host": "127.0.0.1",
        "port": port,
        "context-length": config.data.max_prompt_tokens + config.longest_response + _MARGIN,
        "max-running-requests": rollout.max_num_seqs,
        "chunked-prefill-size": rollout.max_num_batched_tokens,
        "random-seed": config.seed + replica,
        "tp-size": rollout.tensor_parallel_size,
        "weight-version": "0",
        "custom-weight-loader": LOADER,
        "log-level": "warning",
    }
    flags = {
        "skip-tokenizer-init",  # token ids in, token ids out
        "incremental-streaming-output",
        # With it the result of a step under old weights may be taken in after an update, and stamped with the new.
        "disable-overlap-schedule",
        "sleep-on-idle",  # it would take a core of its own otherwise
        # It would ask itself for a few tokens, and end if it does not answer within two minutes. How long a start may
        # take is for the run to say, which asks it too.
        "skip-server-warmup",
    }
    if model.routing_spec is not None and rollout.return_routed_experts:
        flags.add("enable-return-routed-experts")
    if model.architecture == "DeepseekV3ForCausalLM":
        # It asks for this key, which transformers does not write. ``models.config`` refuses any other value.
        given["json-model-override-args"] = json.dumps({"moe_layer_freq": 1})
    if config.metrics.engine:
        flags.add("enable-metrics")
    if config.model.trust_remote_code:
        flags.add("trust-remote-code")
    if on_cpu(config):
        given |= {
            "device": "cpu",
            "attention-backend": "torch_native",
            "max-total-tokens": max(rollout.kv_cache_bytes // model.kv_token_bytes(config.kv_value_bytes), 1),
            # max-total-tokens decides. With less, the server does not start where weights, or other processes
            # meanwhile, take more than this share of what was free before.
            "mem-fraction-static": 0.95,
            "cuda-graph-backend-decode": "disabled",
            "cuda-graph-backend-prefill": "disabled",
        }
    else:
        given["mem-fraction-static"] = rollout.gpu_memory_utilization
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [*words, *(f"--{flag}" for flag in sorted(flags)), *_further(rollout.engine_args)]


def _further(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield rollout.engine_args as words: a flag for true, lists as several words, mappings as JSON."""
    for name, value in arguments.items():
        yield f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            yield from map(str, value)
        elif value is not True:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def core_groups(ranks: int, cores: Sequence[int] | None) -> str:
    """Return the cores of each tensor-parallel rank on a CPU, as SGLang takes them; None for those of this process.

    Without it SGLang refuses more ranks than there are NUMA nodes. Where there are fewer cores than ranks these share.
    """
    there = sorted(cores or os.sched_getaffinity(0))
    return "|".join(",".join(map(str, there[rank::ranks] or there)) for rank in range(ranks))


class Server:
    """One server, of which this process is the parent. ``cores``: the CPUs that it should compute on, or None."""

    def __init__(self, config: RunConfig, replica: int, model: ModelConfig, cores: tuple[int, ...] | None) -> None:
        self._config = config
        self._replica = replica
        self._model = model
        self._cores = cores
        self._key = secrets.token_urlsafe(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._members: list[psutil.Process] = []
        self._log_began = 0  # bytes that servers before it have written
        self._temporary = tempfile.TemporaryDirectory(prefix="async-rl-sglang-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        """A folder for files that the server's processes and this one share, and for the sockets between them."""
        self.url: str | None = None
        """Where the server answers; None before its start."""
        self.session: aiohttp.ClientSession | None = None

    @property
    def log(self) -> Path:
        """The file with what the server writes."""
        return self._config.run_dir / "logs" / f"{worker_id(self._replica)}.sglang.log"

    async def start(self) -> None:
        """Start the server and wait until it answers. Raises EngineError."""
        python, nccl = self._config.rollout.sglang.python, self._config.sync_backend == "nccl"
        if (fault := await asyncio.to_thread(versions.fault, python, nccl=nccl)) is not None:
            raise EngineError(f"replica {self._replica}: {fault}")
        port = _free_port()
        self._begin(port)
        self.url = f"http://127.0.0.1:{port}"
        self.session = aiohttp.ClientSession(
            self.url,
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=aiohttp.ClientTimeout(total=None),
            # The server closes idle connections, and a call on one that it has just closed would fail.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            read_bufsize=2**22,
        )
        while not await self._answers():
            try:
                self.check_alive()
            except EngineDied:
                raise EngineError(
                    f"replica {self._replica}: the SGLang server did not start: {self._last_words()} (log: {self.log})"
                ) from None
            await asyncio.sleep(_LOOK_S)
        assert self._process is not None
        self._members = psutil.Process(self._process.pid).children(recursive=True)

    def _begin(self, port: int) -> None:
        python = self._config.rollout.sglang.python
        command = [str(python or sys.executable), "-m", "async_rl.rollout.engine.sglang.launcher"]
        command += arguments(self._config, self._replica, self._model, port)
        environment = os.environ | _ENVIRONMENT | run_token() | self._paths(python)
        environment |= {
            "ASYNC_RL_SGLANG_KEY": self._key,
            "ASYNC_RL_SGLANG_ROLE": f"{worker_id(self._replica)}-sglang",
            "ASYNC_RL_SGLANG_FOLDER": str(self.folder),
            "TMPDIR": str(self.folder),
            # Its processes meet in a file. They are on one host, and a store of PyTorch's listens on every interface.
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": (self.folder / "store").as_uri(),
            # By these its kernels name shared memory that several engines of a host must not share.
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if on_cpu(self._config):
            environment |= _ON_CPU | {"OMP_NUM_THREADS": str(self._config.resources.engine_threads)}
            if (ranks := self._config.rollout.tensor_parallel_size) > 1:
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = core_groups(ranks, self._cores)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log, starting_on(self._cores):
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def _paths(self, python: Path | None) -> dict[str, str]:
        """Return the variables by which the server finds this package, and in another Python nothing else of ours."""
        package = Path(async_rl.__file__).parent
        if python is None:
            known = [str(package.parent), os.environ.get("PYTHONPATH", "")]
            return {"PYTHONPATH": os.pathsep.join(filter(None, known))}
        alone = self.folder / "package"  # beside an installed package are all others of the run's environment
        alone.mkdir()
        (alone / package.name).symlink_to(package)
        # Kernels are compiled with programs of its environment.
        programs = os.pathsep.join(filter(None, [str(python.parent), os.environ.get("PATH", "")]))
        return {"PYTHONPATH": str(alone), "PATH": programs}

    async def _answers(self) -> bool:
        assert self.session is not None
        try:
            async with self.session.get("/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _last_words(self) -> str:
        lines = self.log.read_bytes()[self._log_began :].decode(errors="replace").splitlines()
        errors = [line for line in lines if line and not line[0].isspace() and "Error" in line.split(":")[0]]
        return errors[-1] if errors else lines[-1] if lines else "it wrote nothing"

    def check_alive(self) -> None:
        """Raise EngineDied if the server, or one of its processes, is gone."""
        process = self._process
        if process is None or process.poll() is not None:
            raise EngineDied(f"replica {self._replica}: the SGLang server died (log: {self.log})")
        for member in self._members:
            with contextlib.suppress(psutil.NoSuchProcess):
                if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                    continue
            raise EngineDied(f"replica {self._replica}: a process of the SGLang server died (log: {self.log})")

    def kill(self) -> None:
        """End the server with all of its processes. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        members = [*self._members, *_descendants(process.pid)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()

    async def close(self) -> None:
        """Close the connections to the server, which was killed, and remove its files. May be called twice."""
        session, self.session = self.session, None
        if session is not None:
            await session.close()
        self._temporary.cleanup()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    """Return a port that was free a moment ago: the server takes a number, and no socket."""
    with hold_port("127.0.0.1") as listening:
        port: int = listening.getsockname()[1]
    return port
