"""The ranks of a vLLM engine on one of its hosts but the first, where its engine core is.

The engine core starts its own ranks, all ranks meet over the network, and from then on each does what the engine core
sends it. So this process starts its host's ranks and waits. Knows vLLM 0.30 (``vllm serve --headless`` does the same);
neither Ray nor the trainer.
"""

from __future__ import annotations

from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.errors import EngineError
from async_rl.models.config import read_model_config
from async_rl.rollout.engine.interface import Part
from async_rl.rollout.engine.vllm import process
from async_rl.runtime import logs
from async_rl.runtime.process import starting_on


class VllmPart:
    """One host's ranks. ``role`` names its logs, ``cores`` are the CPUs of the ranks, or None."""

    def __init__(self, config: RunConfig, replica: int, role: str, cores: tuple[int, ...] | None) -> None:
        self._config = config
        self._replica = replica
        self._role = role
        self._cores = cores
        self._executor: Any = None

    def run(self, part: Part) -> None:
        """Start the ranks, and return once one of them has ended, which ends the others. Raises EngineError.

        In a thread that does not end before: the kernel ends the ranks with the thread that started them.
        """
        model = read_model_config(self._config.model.path)
        process.prepare(self._config, model, part)
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        logs.lend_to_children(self._config.run_dir, self._role)
        before = logs.children_logs(self._config.run_dir, self._role)
        try:
            with starting_on(self._cores):
                arguments = process.engine_args(self._config, self._replica, model, part)
                settings = arguments.create_engine_config(headless=True)
                self._executor = MultiprocExecutor(settings, monitor_workers=False)
        except Exception as error:
            raise EngineError(process.why_not_started(self._config, self._role, error, before)) from error
        self._executor.start_worker_monitor(inline=True)

    def shutdown(self) -> None:
        """End the ranks, so that ``run`` returns."""
        process.kill_engine_processes()
        if self._executor is not None:
            self._executor.shutdown()
