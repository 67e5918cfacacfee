"""A model's parameters spread over ranks as Megatron spreads them, in modules that hold tensors and compute nothing.

Ranks are processes that meet over gloo. They start in a moment: a fork server has imported Megatron for all of them.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from async_rl.config.training import ParallelSection
from async_rl.models import names
from async_rl.models.config import LatentAttention, ModelConfig
from async_rl.runtime.process import signal_on_parent_death
from async_rl.trainer.parallel import Place, world_size

# Far beyond what a call takes on an idle machine.
TIMEOUT_S = 900.0

QWEN = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    qk_norm=True,
    moe_layers=(1, 2),
    num_experts=128,
    top_k=2,
    moe_intermediate_size=4,
)
# Biases of q, k and v, a router's bias in float32, shared experts, an output layer of its own.
GLM = replace(
    QWEN,
    architecture="Glm4MoeForCausalLM",
    tie_word_embeddings=False,
    qkv_bias=True,
    expert_bias=True,
    num_experts=8,
    shared_intermediate_size=8,
)
DEEPSEEK = replace(
    GLM,
    architecture="DeepseekV3ForCausalLM",
    qk_norm=False,
    qkv_bias=False,
    latent=LatentAttention(query_rank=6, key_value_rank=10, plain_dim=4, rotary_dim=2, value_dim=4, yarn=None),
)


class Rank:
    """One rank's part of a random model."""

    def __init__(self, model: ModelConfig, sizes: ParallelSection, rank: int, layout: names.Layout) -> None:
        from async_rl.trainer.megatron.model import _where

        self.model, self.layout, self.place = model, layout, Place.of(sizes, rank)
        parameters: list[dict[str, torch.Tensor]] = [{} for _ in range(sizes.vpp)]
        for entry in names.entries(model, layout):
            part, parts = (self.place.tp, sizes.tp) if entry.expert is None else (self.place.etp, sizes.etp)
            for chunk, name in _where(entry, model, self.place):
                pieces = [names.part(entry, whole(model, hf), part, parts) for hf in entry.hf]
                parameters[chunk][name] = names.to_megatron(model, entry.kind, pieces).contiguous()
        self.chunks = [Chunk(each) for each in parameters]

    @property
    def held_bytes(self) -> int:
        """Bytes of all parameters that this rank has."""
        return sum(t.numel() * t.element_size() for chunk in self.chunks for _, t in chunk.tensors.items())

    def change(self) -> None:
        """Do what an optimizer's update does: every value is another one."""
        for chunk in self.chunks:
            for tensor in chunk.tensors.values():
                tensor.neg_()

    def groups(self) -> tuple[Any, Any]:
        """Return the groups of ranks with other parts of this rank's dense parameters, and of its experts."""
        places = [Place.of(self.place.sizes, rank) for rank in range(world_size(self.place.sizes))]

        def group(size: int) -> Any:
            found = None
            for first in range(0, len(places), size):
                made = torch.distributed.new_group(list(range(first, first + size)))
                found = made if first <= self.place.rank < first + size else found
            return found

        return group(self.place.sizes.tp), group(self.place.sizes.etp)


class Chunk:
    """Has parameters and buffers as a module has them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, tensor) for name, tensor in self.tensors.items() if "expert_bias" not in name)

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, tensor) for name, tensor in self.tensors.items() if "expert_bias" in name)


def whole(model: ModelConfig, name: str) -> torch.Tensor:
    """Return the whole Hugging Face tensor of this name, with values of its own."""
    dtype = torch.float32 if "e_score_correction_bias" in name else torch.bfloat16
    # hash() differs between processes
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-16:], "little") % 2**61)
    return torch.randn(shape(model, name), generator=generator).to(dtype)


def total_bytes(model: ModelConfig, layout: names.Layout) -> int:
    """Return the bytes of all tensors of a model."""
    return sum(whole(model, name).nbytes for entry in names.entries(model, layout) for name in entry.hf)


def shape(model: ModelConfig, name: str) -> tuple[int, ...]:
    """Return the shape of a Hugging Face tensor."""
    hidden, heads, head, latent = model.hidden_size, model.num_heads, model.head_dim, model.latent
    *_, module, last = name.split(".")
    if module == "gate" and last == "e_score_correction_bias":
        return (model.num_experts,)
    rows = {
        "embed_tokens": (model.vocab_size, hidden),
        "lm_head": (model.vocab_size, hidden),
        "q_proj": (heads * head, hidden),
        "k_proj": (model.num_kv_heads * head, hidden),
        "v_proj": (model.num_kv_heads * head, hidden),
        "o_proj": (hidden, heads * (head if latent is None else latent.value_dim)),
        "gate": (model.num_experts, hidden),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    if latent is not None:
        rank = latent.query_rank or 0
        rows |= {
            "q_a_proj": (rank, hidden),
            "q_a_layernorm": (rank,),
            "q_b_proj": (heads * (latent.plain_dim + latent.rotary_dim), rank),
            "kv_a_proj_with_mqa": (latent.key_value_rank + latent.rotary_dim, hidden),
            "kv_a_layernorm": (latent.key_value_rank,),
            "kv_b_proj": (heads * (latent.plain_dim + latent.value_dim), latent.key_value_rank),
        }
    width = model.intermediate_size
    if ".shared_experts." in name:
        width = model.shared_intermediate_size
    elif ".experts." in name:
        width = model.moe_intermediate_size
    rows |= {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    found = rows.get(module, (hidden,))
    return found[:1] if last == "bias" else found


def run(function: Callable[..., Any], sizes: ParallelSection, *arguments: Any) -> list[Any]:
    """Call ``function(place, *arguments)`` on every rank of a layout, and return the results by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["async_rl.trainer.megatron.gather", __name__])
    count = world_size(sizes)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            place = Place.of(sizes, rank)
            arguments_of_rank = (theirs, str(Path(folder) / "store"), count, function, place, arguments)
            processes.append(context.Process(target=_rank, args=arguments_of_rank, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            end = time.monotonic() + TIMEOUT_S
            results: dict[Any, Any] = {}
            while waiting := [pipe for pipe in pipes if pipe not in results]:
                ended = multiprocessing.connection.wait(waiting, max(end - time.monotonic(), 0.0))
                assert ended, f"{len(waiting)} of {count} ranks did not end"
                for pipe in ended:
                    results[pipe] = pipe.recv()
                    if isinstance(results[pipe], Exception):
                        raise results[pipe]
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [results[pipe] for pipe in pipes]


def _rank(pipe: Any, store: str, count: int, function: Any, place: Place, arguments: tuple[Any, ...]) -> None:
    signal_on_parent_death(signal.SIGKILL)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, count),
        rank=place.rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        result = function(place, *arguments)
        torch.distributed.barrier()  # a rank that ended would take its connections along
    except Exception as error:  # noqa: BLE001 - raised by ``run``
        result = error
    pipe.send(result)
