"""Fused rotary embeddings, which Megatron imports, and calls with ``apply_rope_fusion`` alone."""


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    raise NotImplementedError("the stand-in for Transformer Engine has no fused rotary embeddings")
