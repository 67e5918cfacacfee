"""Replays routed experts with Megatron's native RouterReplay, in the forward pass and in recomputation.

Megatron 0.16.1 keeps, per router, one forward target and a list of targets for recomputation that it pops in order.
``RoutingReplay`` finds the routers of one model by walking it (Megatron's own registry is class-wide and grows with
every model), addresses them by global layer number, and brackets each microbatch; the class docstring has the protocol.

A row of NO_ROUTING goes through the native router, that row only (invariant 8). Megatron does not check a target's
shape, range or duplicates: ``samples.check_routed_experts`` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from async_rl.errors import ReplayError
from async_rl.models.config import ModelConfig
from async_rl.trainer.parallel import Int64Array, Place, router_rows
from async_rl.types import Int32Array


class _RowwiseReplay(RouterReplay):  # type: ignore[misc]  # Megatron has no types
    """A RouterReplay whose rows of NO_ROUTING are decided by the router's own top-k, in each pass again.

    recomputed: whether backward passes run the router again, which needs the targets of all forward passes until then.
    """

    def __init__(self, *, recomputed: bool) -> None:
        super().__init__()
        self.recomputed = recomputed
        # Whether a target has rows of NO_ROUTING: of the next forward pass, and of those to be recomputed. It is known
        # on the host, for asking the device makes the host wait in each layer.
        self.fallback = True
        self._fallbacks: deque[bool] = deque()
        # bool[rows]: the rows of the next forward pass to compare with the router's own choice; None for no row.
        self.compared: torch.Tensor | None = None
        self.choices: torch.Tensor | float = 0.0
        self.unlike: torch.Tensor | float = 0.0
        # The registry would keep this object, and its targets, for the life of the process.
        RouterReplay.global_router_replay_instances.remove(self)

    def set_target_indices(self, topk_indices: torch.Tensor, *, fallback: bool = True) -> None:
        """Take the target of the next forward pass, which is kept for its recomputation if there will be one.

        fallback: whether it may have rows of NO_ROUTING.
        """
        self.fallback = fallback
        if self.recomputed and torch.is_grad_enabled():
            super().set_target_indices(topk_indices)
            self._fallbacks.append(fallback)
        else:
            self.target_topk_idx = topk_indices

    def clear_indices(self) -> None:
        """Forget all targets."""
        super().clear_indices()
        self._fallbacks.clear()

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert default_compute_topk is not None
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            target, fallback = self.target_topk_idx, self.fallback
        elif self.router_replay_action is RouterReplayAction.REPLAY_BACKWARD:
            waiting = bool(self.replay_backward_list)
            target = self.replay_backward_list.pop(0) if waiting else None
            fallback = self._fallbacks.popleft() if waiting else False
        else:
            native: tuple[torch.Tensor, torch.Tensor] = super().get_replay_topk(
                scores, topk, num_groups, group_topk, default_compute_topk
            )
            return native
        if target is None or target.shape != (scores.shape[0], topk):
            found = "none" if target is None else list(target.shape)
            raise ReplayError(f"router got {scores.shape[0]} rows of {topk} experts, its target is {found}")
        if self.compared is not None or fallback:
            absent = target[:, :1] < 0
            with torch.no_grad():
                _, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            if self.compared is not None:
                self._compare(target, chosen, self.compared[:, None] & ~absent)
            target = torch.where(absent, chosen, target)
        target = target.long()  # small until here, for torch gathers by int64 only
        return scores.gather(1, target), target

    def _compare(self, target: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor) -> None:
        """Count the experts of ``target`` int64[T, K] in rows bool[T, 1], and those that ``chosen`` does not have."""
        unlike = (target[:, :, None] != chosen[:, None, :]).all(dim=2) & rows
        self.choices = self.choices + rows.sum() * target.shape[1]
        self.unlike = self.unlike + unlike.sum()
        self.compared = None  # recomputation would count the same again


class RoutingReplay:
    """Controls all routers of one rank's part of a model, which may be several virtual pipeline chunks.

    Around a schedule: ``with replay.schedule():``. Within it, once per microbatch and chunk, in the forward step:
    ``before_forward`` with the microbatch's routed experts (None: native routing), the chunk's forward pass,
    ``after_forward``. A recomputing backward pass then pops the rows in the order in which they were given, even while
    several microbatches are in the pipeline. Within ``with replay.recording():`` nothing is replayed, and ``recorded``
    returns the experts that the routers chose in a chunk's last forward pass.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], model: ModelConfig, place: Place) -> None:
        self._model = model
        self._place = place
        # For each chunk: (index among the model's MoE layers, router).
        self._routers: list[list[tuple[int, TopKRouter]]] = []
        self._verifiers: list[_Verifier] = []
        for number, chunk in enumerate(chunks):
            found = []
            for name, router in chunk.named_modules():
                # A multi-token-prediction head routes too, but the engine returns nothing for it.
                if isinstance(router, TopKRouter) and "mtp" not in name.split("."):
                    router.router_replay = _RowwiseReplay(recomputed=_is_recomputed(router, name))
                    found.append((model.moe_layers.index(router.layer_number - 1), router))
            self._routers.append(sorted(found, key=lambda pair: pair[0]))
            _, expected = self._share(np.zeros(1, dtype=np.int32), number)
            if [layer for layer, _ in found] != expected:
                raise ReplayError(
                    f"rank {place.rank}, chunk {number}: routers of MoE layers {[layer for layer, _ in found]} were "
                    f"built where the layout has {expected}"
                )
        self._devices = [next(chunk.parameters()).device for chunk in chunks]
        self._recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record routing instead of replaying it, until the block ends."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    @contextmanager
    def schedule(self, *, verify: bool = False) -> Iterator[None]:
        """Bracket one schedule: nothing that is armed in it survives it, however it ends."""
        self._verifiers = [_Verifier(routers) for routers in self._routers] if verify else []
        try:
            yield
        finally:
            for verifier in self._verifiers:
                verifier.close()
            self._verifiers = []
            for _, router in (pair for routers in self._routers for pair in routers):
                router.router_replay.clear_indices()
                router.router_replay.clear_router_replay_action()
                router.router_replay.compared = None

    def before_forward(
        self,
        routed_experts: npt.NDArray[np.int16] | Int32Array | None,
        cu_seqlens: Int32Array,
        chunk: int = 0,
        compared: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Arm a chunk's next forward pass with its share of a microbatch's routed_experts int[T, L, K].

        compared: bool[T], the rows to count in ``take_disagreement``.
        """
        if self._recording:
            self._act(chunk, RouterReplayAction.RECORD)
        elif routed_experts is not None:
            rows, _ = self._share(cu_seqlens, chunk)
            fallback = np.any(routed_experts[rows, :, 0] < 0, axis=0)
            share = torch.from_numpy(routed_experts[rows]).to(self._devices[chunk])
            counted = None if compared is None else torch.from_numpy(compared[rows]).to(self._devices[chunk])
            for layer, router in self._routers[chunk]:
                router.router_replay.set_target_indices(share[:, layer], fallback=bool(fallback[layer]))
                router.router_replay.compared = counted
            self._act(chunk, RouterReplayAction.REPLAY_FORWARD)
            if self._verifiers:
                self._verifiers[chunk].expect(share)

    def after_forward(self, chunk: int = 0) -> None:
        """Switch a chunk's routers to the rows that recomputation replays."""
        routers = self._routers[chunk]
        if routers and routers[0][1].router_replay.target_topk_idx is not None:
            self._act(chunk, RouterReplayAction.REPLAY_BACKWARD)

    def take_disagreement(self) -> tuple[float, float]:
        """Return (experts replayed, those of them that the routers would not have chosen) since the last call.

        They are counted over the rows to compare of all this rank's routers.
        """
        replays = [router.router_replay for routers in self._routers for _, router in routers]
        result = float(sum(replay.choices for replay in replays)), float(sum(replay.unlike for replay in replays))
        for replay in replays:
            replay.choices = replay.unlike = 0.0
        return result

    def recorded(self, chunk: int = 0) -> dict[int, torch.Tensor]:
        """Return the experts that the routers of a chunk chose: MoE layer index -> int64[rows, K]."""
        return {layer: router.router_replay.get_recorded_indices() for layer, router in self._routers[chunk]}

    def _share(self, cu_seqlens: Int32Array, chunk: int) -> tuple[Int64Array, list[int]]:
        return router_rows(cu_seqlens, self._model.moe_layers, self._model.num_layers, self._place, chunk)

    def _act(self, chunk: int, action: RouterReplayAction) -> None:
        for _, router in self._routers[chunk]:
            router.router_replay.set_router_replay_action(action)


def _is_recomputed(router: TopKRouter, name: str) -> bool:
    """Return whether a backward pass runs the router again: with its whole layer, or with its MoE block.

    name: of the module in its chunk, decoder.layers.N and so on.
    """
    config = router.config
    if config.recompute_granularity == "full":
        number = int(name.partition("layers.")[2].partition(".")[0])
        return bool(config.recompute_method == "uniform" or number < config.recompute_num_layers)
    return bool(config.recompute_granularity == "selective" and "moe" in config.recompute_modules)


class _Verifier:
    """Compares the routing map that leaves each router of a chunk, which the dispatcher executes, with the target.

    In the forward pass that is the target just given, in recomputation the oldest that was not recomputed yet.
    """

    def __init__(self, routers: list[tuple[int, TopKRouter]]) -> None:
        self._rows: torch.Tensor | None = None
        self._to_recompute: dict[int, deque[torch.Tensor]] = {
            layer: deque() for layer, router in routers if router.router_replay.recomputed
        }
        self._hooks = [
            router.register_forward_hook(lambda r, _i, output, layer=layer: self._compare(layer, r, output[1]))
            for layer, router in routers
        ]

    def expect(self, rows: torch.Tensor) -> None:
        """Keep the target [rows, L, K] of the next forward pass."""
        self._rows = rows
        for waiting in self._to_recompute.values():
            waiting.append(rows)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _compare(self, layer: int, router: TopKRouter, routing_map: torch.Tensor) -> None:
        if self._rows is None:
            return
        recomputing = router.router_replay.router_replay_action is RouterReplayAction.REPLAY_BACKWARD
        rows = self._to_recompute[layer].popleft() if recomputing else self._rows
        target = rows[:, layer]
        asked = torch.zeros_like(routing_map).scatter_(1, target.clamp(min=0).long(), value=True)
        wrong = ((asked != routing_map).any(dim=1) & (target[:, 0] >= 0)).nonzero().flatten().tolist()
        if wrong:
            executed = routing_map[wrong[0]].nonzero().flatten().tolist()
            raise ReplayError(
                f"rank {torch.distributed.get_rank()}, MoE layer {layer}: {len(wrong)} of {len(target)} rows executed "
                f"other experts than asked for; first row {wrong[0]}: asked {sorted(target[wrong[0]].tolist())}, "
                f"executed {executed}"
            )
