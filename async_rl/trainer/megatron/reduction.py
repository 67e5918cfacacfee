"""Sums the gradients of one model's chunks over the ranks, while the last backward pass of a step still runs.

Megatron's DistributedDataParallel begins to reduce a bucket of gradients when a backward pass has completed it, in the
last microbatch of each schedule. But a step here is several schedules, of which the last alone may do that: a bucket
that was reduced before would be summed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.utils import get_model_config


class GradientReduction:
    """Zeroes, reduces and divides the gradients of ``chunks``; see trainer.ddp overlap_grad_reduce."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks = list(chunks)
        self._overlaps = chunks[0].ddp_config.overlap_grad_reduce
        self._begun = False

    def zero(self) -> None:
        """Set all gradients to zero."""
        for chunk in self._chunks:
            if self._begun:  # by a step that had no token to train
                chunk.finish_grad_sync()
            chunk.zero_grad_buffer()
        self._begun = False

    @contextmanager
    def schedule(self, *, last: bool) -> Iterator[None]:
        """Bracket a schedule, which reduces what it completes if it is the ``last`` one before ``finish``."""
        if not self._overlaps:
            yield
            return
        config = get_model_config(self._chunks[0])
        with ExitStack() as stack:
            if last:
                each = [chunk.no_sync for chunk in self._chunks]
                config.no_sync_func = each if len(each) > 1 else each[0]
                stack.callback(setattr, config, "no_sync_func", None)
            else:
                for chunk in self._chunks:
                    stack.enter_context(chunk.no_sync())
            yield
        self._begun = last

    def finish(self, divisor: float) -> None:
        """Leave the sum of all ranks' gradients, over ``divisor``, in the parameters' main_grad."""
        if self._overlaps and not self._begun:  # the last schedule had no microbatch
            for chunk in self._chunks:
                chunk.start_grad_sync()
        finalize_model_grads(self._chunks, None)
        self._begun = False
        for chunk in self._chunks:
            chunk.scale_gradients(1.0 / divisor)
