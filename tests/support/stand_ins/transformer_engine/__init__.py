"""Stands in for NVIDIA's Transformer Engine in tests, so that Megatron's layers for GPUs run on a CPU.

Never installed: ``tests.support.gpu_layers`` puts it on a test process's path. Constructors, calls, names of parameters
and what ``set_tensor_parallel_attributes`` marks are those of transformer-engine 2.11.0, the version of the extra
``gpu``, checked against the Python sources of its wheel (``tests.support.te_signatures`` has the table). What that
version lacks is absent here too, for Megatron-core asks for it: ``module.base.get_workspace``,
``attention._SplitAlongDim``. What a GPU's kernels compute is computed in plain torch, in float32 to float32's rounding.
Without a counterpart: FP8, overlapped communication, fused rotary embeddings, CUDA graphs. They raise
NotImplementedError.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"

__all__ = ["__version__", "common", "pytorch"]
