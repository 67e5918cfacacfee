"""Counts what a rank says to the others through torch.distributed, and the copies that torch makes meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Whatever else passes tensors between ranks: what is counted below must be all that there is.
OTHERS = (
    *("all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"),
    *("all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv"),
    *("isend", "recv_object_list", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
    *("scatter_object_list", "send_object_list"),
)


@dataclass
class Traffic:
    """What one rank has done."""

    calls: int = 0
    """Collectives and point-to-point calls, a batch counted as one."""
    messages: int = 0
    """Messages sent, where an all_gather sends one to each other rank."""
    sent_bytes: int = 0
    received_bytes: int = 0
    copies: int = 0
    """Calls of torch that write what they read to another place in memory."""
    copied_bytes: int = 0


class _Copies(TorchDispatchMode):
    """Counts calls that copy; views and what is only allocated are none."""

    COPYING = ("aten.copy_", "aten.cat", "aten.clone", "aten._to_copy")

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(self.COPYING):
            self._traffic.copies += 1
            self._traffic.copied_bytes += result.numel() * result.element_size()
        return result


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count this rank's traffic until the block ends. Raises AssertionError for a call that is not counted."""
    traffic = Traffic()
    real = {name: getattr(torch.distributed, name) for name in ("all_gather", "send", "recv", "batch_isend_irecv")}

    def all_gather(pieces: list[torch.Tensor], part: torch.Tensor, group: Any = None) -> Any:
        others = torch.distributed.get_world_size(group) - 1
        traffic.calls += 1
        traffic.messages += others
        traffic.sent_bytes += others * _bytes(part)
        traffic.received_bytes += others * _bytes(part)
        return real["all_gather"](pieces, part, group=group)

    def send(tensor: torch.Tensor, dst: int) -> Any:
        traffic.calls += 1
        traffic.messages += 1
        traffic.sent_bytes += _bytes(tensor)
        return real["send"](tensor, dst)

    def recv(tensor: torch.Tensor, src: int) -> Any:
        traffic.calls += 1
        traffic.received_bytes += _bytes(tensor)
        return real["recv"](tensor, src)

    def batch_isend_irecv(operations: list[Any]) -> Any:
        traffic.calls += 1
        sent = [operation.tensor for operation in operations if operation.op is torch.distributed.isend]
        traffic.messages += len(sent)
        traffic.sent_bytes += sum(map(_bytes, sent))
        traffic.received_bytes += sum(_bytes(each.tensor) for each in operations if each.op is torch.distributed.irecv)
        return real["batch_isend_irecv"](operations)

    def refuse(name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"torch.distributed.{name} is not counted")

        return call

    wrappers = {"all_gather": all_gather, "send": send, "recv": recv, "batch_isend_irecv": batch_isend_irecv}
    # A batch names what it consists of by these two, and calls them by itself.
    refused = {name: refuse(name) for name in OTHERS if name not in ("isend", "irecv")}
    with contextlib.ExitStack() as stack:
        for name, wrapper in {**wrappers, **refused}.items():
            if hasattr(torch.distributed, name):
                stack.enter_context(mock.patch.object(torch.distributed, name, wrapper))
        stack.enter_context(_Copies(traffic))
        yield traffic
