"""Records which arguments the modules of Transformer Engine take that its stand-in has, from the wheel's sources.

    pip download --no-deps transformer-engine==VERSION
    python -m tests.support.te_signatures transformer_engine-VERSION-py3-none-any.whl

writes ``stand_ins/te_signatures.json``, with which tests/unit/test_te_stand_in.py compares the stand-in. It reads the
sources without importing them, which would need a GPU's libraries.
"""

import ast
import json
import sys
import zipfile
from pathlib import Path

TABLE = Path(__file__).parent / "stand_ins" / "te_signatures.json"

# What Megatron-core 0.16.1 calls, by the file that defines it; the last name is a function, or a method of a class.
CALLED = {
    "module/linear.py": ("Linear.__init__", "Linear.forward"),
    "module/layernorm_linear.py": ("LayerNormLinear.__init__", "LayerNormLinear.forward"),
    "module/grouped_linear.py": ("GroupedLinear.__init__", "GroupedLinear.forward"),
    "module/rmsnorm.py": ("RMSNorm.__init__",),
    "module/layernorm.py": ("LayerNorm.__init__",),
    "module/base.py": ("get_dummy_wgrad",),
    "attention/dot_product_attention/dot_product_attention.py": (
        "DotProductAttention.__init__",
        "DotProductAttention.forward",
    ),
    "attention/rope.py": ("apply_rotary_pos_emb",),
    "optimizers/fused_adam.py": ("FusedAdam.__init__", "FusedAdam.step"),
    "permutation.py": (
        "moe_permute",
        "moe_permute_with_probs",
        "moe_unpermute",
        "moe_sort_chunks_by_index",
        "moe_sort_chunks_by_index_with_probs",
    ),
    "distributed.py": ("set_tensor_model_parallel_attributes",),
    "cpu_offload.py": ("get_cpu_offload_context",),
    "router.py": (
        "fused_topk_with_score_function",
        "fused_compute_score_for_moe_aux_loss",
        "fused_moe_aux_loss",
    ),
}
# What Megatron asks for and this version does not have; the stand-in must not have it either.
ABSENT = {"module/base.py": "get_workspace", "attention/__init__.py": "_SplitAlongDim"}


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:

        def source(file: str) -> ast.Module:
            return ast.parse(archive.read(f"transformer_engine/pytorch/{file}"))

        table = {
            f"{file}:{name}": arguments(_find(source(file), name)) for file, names in CALLED.items() for name in names
        }
        for file, name in ABSENT.items():
            assert not any(name in ast.dump(node) for node in source(file).body), f"{file} has {name}"
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        version = next(
            line.removeprefix("Version: ")
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Version: ")
        )
    TABLE.write_text(json.dumps({"version": version, "arguments": table}, indent=1) + "\n")


def _find(node: ast.AST, name: str) -> ast.FunctionDef:
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def arguments(function: ast.FunctionDef) -> list[str]:
    """Return the names in order, with their defaults as they stand in the source; ``*`` begins those by keyword."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    rows = [_row(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if given.kwonlyargs:
        rows += ["*", *(_row(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True))]
    if given.kwarg is not None:
        rows.append("**" + given.kwarg.arg)
    return rows


def _row(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


if __name__ == "__main__":
    main(sys.argv[1])
