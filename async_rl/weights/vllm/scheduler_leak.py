"""A repair of vLLM 0.30: without it the scheduler keeps something of each request that was aborted.

With routed experts on, ``Scheduler.schedule`` notes the KV blocks of each request of a step in ``_re_block_ids``, and
``update_from_output`` removes the entry when the step's token arrives. For a request that is freed in between, because
its call was cancelled or stopped one step earlier under asynchronous scheduling, that never happens: 28 to 30 entries
of 32 cancelled calls stayed, 1 to 8 kB each for a sequence of 16,384 tokens. See vLLM's pull request 49684.

The plugin installs this in engine processes, before their scheduler exists. The test
``test_vllm_still_keeps_an_entry_of_each_aborted_request`` fails once vLLM removes it, and then this file can go.
"""

from __future__ import annotations

import functools
from typing import Any

VLLM_VERSION = "0.30."


def forget_freed_requests() -> None:
    """Make vLLM's scheduler remove the entry of each request that it frees. Idempotent; other versions are left alone.

    Nothing reads the entry afterwards: the outputs of a request that is gone are skipped.
    """
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler

    free = Scheduler._free_request
    if not vllm.__version__.startswith(VLLM_VERSION) or hasattr(free, "async_rl_forgets"):
        return

    @functools.wraps(free)
    def free_and_forget(self: Any, request: Any, *arguments: Any, **named: Any) -> Any:
        if self.enable_return_routed_experts:
            self._re_block_ids.pop(request.request_id, None)
        return free(self, request, *arguments, **named)

    free_and_forget.async_rl_forgets = True  # type: ignore[attr-defined]
    Scheduler._free_request = free_and_forget
