"""Makes a process compute on the CPU with the layers that every run on GPUs has: Transformer Engine's.

They come from ``stand_ins/transformer_engine``, or from nothing else: a machine with the real one has GPUs, on which
tests/gpu runs it.
"""

import sys
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


def use() -> None:
    """Have this process's trainers build with the stand-in, before Megatron is imported."""
    install()

    from async_rl.trainer.megatron import platform

    platform.layout = lambda _device: "transformer_engine"


def use_in_tf32() -> None:
    """Do the same with factors of products rounded to TF32, as Transformer Engine rounds them where all is float32."""
    use()

    import torch
    from transformer_engine.pytorch.module import grouped_linear, linear

    def rounded(tensor):
        # Of 23 bits of the mantissa 10 remain.
        return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return rounded(x) @ rounded(weight).T

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            gradient = rounded(gradient)
            return gradient @ rounded(weight), gradient.flatten(0, -2).T @ rounded(x).flatten(0, -2)

    linear.product = grouped_linear.product = Product.apply


def install() -> None:
    """Make ``transformer_engine`` importable, as on a machine with GPUs, and leave the trainer as it is."""
    assert "megatron.core" not in sys.modules, "Megatron has noticed already that Transformer Engine is absent"
    sys.path.insert(0, str(STAND_INS))

    import torch
    import torch._dynamo

    # Fused activations, which GPUs compile, would need a C++ compiler here.
    torch._dynamo.config.disable = True
    # Megatron makes one for context parallelism, and passes it to the attention.
    torch.cuda.Stream = lambda *_, **__: None
