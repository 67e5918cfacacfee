"""Sorting tokens by expert, as a function of a mask, and back.

The map from ``moe_permute`` to ``moe_unpermute`` has the shape of the real one, [T, 2 x experts + 1], for callers may
look at no more of it than that; its first columns have the row of each (token, expert) in the sorted order, or -1.
"""

import torch


def _rows(routing_map: torch.Tensor) -> torch.Tensor:
    """Return int64[T, 2 x experts + 1], whose first columns have the row of a token's copy for an expert, or -1."""
    tokens, experts = routing_map.shape
    chosen = routing_map.bool().T  # [experts, T]: the order of the copies
    rows = torch.full((experts, tokens), -1, dtype=torch.int64)
    rows[chosen] = torch.arange(int(chosen.sum()))
    padding = torch.full((tokens, experts + 1), -1, dtype=torch.int64)
    return torch.cat([rows.T, padding], dim=1)


def _permute(inp, routing_map, num_out_tokens, probs):
    if not inp.numel():
        return inp, torch.tensor([]), torch.tensor([])
    if inp.size(0) != routing_map.size(0):
        raise ValueError(f"{inp.size(0)} tokens, but {routing_map.size(0)} rows of routing")
    if num_out_tokens is None:
        raise ValueError("num_out_tokens must be provided to the fused permute function.")
    rows = _rows(routing_map)
    _, tokens = torch.nonzero(routing_map.bool().T, as_tuple=True)
    # The real one allocates as many rows as the caller says.
    if num_out_tokens not in (-1, len(tokens)):
        raise ValueError(f"{len(tokens)} copies for num_out_tokens {num_out_tokens}")
    permuted = None if probs is None else probs.T.masked_select(routing_map.bool().T)
    return inp.index_select(0, tokens), rows, permuted


def moe_permute(
    inp: torch.Tensor,
    routing_map: torch.Tensor,
    num_out_tokens: int = -1,
    max_token_num: int = -1,
    map_type: str = "mask",
):
    assert map_type == "mask", map_type
    output, rows, _ = _permute(inp, routing_map, num_out_tokens, None)
    return output, rows


def moe_permute_with_probs(inp: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int = -1):
    output, rows, permuted = _permute(inp, routing_map, num_out_tokens, probs)
    return output, permuted, rows


def moe_unpermute(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    merging_probs: torch.Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: torch.Tensor | None = None,
):
    assert map_type == "mask", map_type
    assert probs is None
    if not inp.numel():
        return inp
    rows = row_id_map[:, : row_id_map.size(1) // 2]
    tokens, experts = torch.nonzero(rows >= 0, as_tuple=True)
    copies = inp.float().index_select(0, rows[tokens, experts])
    if merging_probs is not None:
        copies = copies * merging_probs[tokens, experts].unsqueeze(-1)
    shape = inp.shape if restore_shape is None else restore_shape
    return torch.zeros(shape).index_add(0, tokens, copies).to(inp.dtype)


def _sort_chunks(inp, split_sizes, sorted_index, probs):
    if not inp.numel():
        return inp, probs
    sizes, order = split_sizes.tolist(), sorted_index.tolist()
    if len(sizes) != len(order):
        raise ValueError(f"{len(sizes)} chunks, but an order of {len(order)}")
    tensors = [inp] if probs is None else [inp, probs]
    moved = [torch.cat([parts[i] for i in order]) for parts in (tensor.split(sizes) for tensor in tensors)]
    return moved[0], moved[1] if probs is not None else None


def moe_sort_chunks_by_index(inp: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor):
    return _sort_chunks(inp, split_sizes, sorted_index, None)[0]


def moe_sort_chunks_by_index_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor
):
    return _sort_chunks(inp, split_sizes, sorted_index, probs)
