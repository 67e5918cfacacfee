"""Makes checkpoints in block-wise fp8, and computes what they mean by the published rule, with NumPy alone."""

import json

import numpy as np


def config(**changes):
    """Return the quantization_config of DeepSeek-V3."""
    published = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    return {key: value for key, value in (published | changes).items() if value is not None}


def quantize(weight, block):
    """Return (float8_e4m3fn[out, in], scales float32[ceil(out/rows), ceil(in/columns)]) of a float32 tensor."""
    import torch

    rows, columns = block
    grid = [-(-size // part) for size, part in zip(weight.shape, block, strict=True)]
    scales = torch.empty(grid)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[place].abs().max() / 448.0  # the largest finite e4m3
            values[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def expected_bits(values, scales, block):
    """Return the bits uint16[out, in] of the bfloat16 that a quantized weight means, decoded bit by bit."""
    import torch

    codes = values.view(torch.uint8).numpy().astype(np.int64)
    sign, exponent, mantissa = codes >> 7, codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[codes & 127 == 127] = np.nan
    decoded = np.where(sign == 1, -magnitude, magnitude).astype(np.float32)
    row, column = np.indices(decoded.shape)
    products = decoded * scales.float().numpy()[row // block[0], column // block[1]]
    bits = products.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even


def write(folder, files, config_json):
    """Write a checkpoint folder with these files, {name: {tensor name: tensor}}, and a tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_json))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def quantize_folder(source, folder, block):
    """Write the checkpoint ``source`` to ``folder`` with its projections in fp8, as published; return the expected.

    {name: (bits uint16, or None where a tensor is as it was, tensor of the source)}
    """
    from safetensors.torch import load_file

    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    written, meant = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            written[name], meant[name] = tensor, None
            continue
        written[name], written[name + "_scale_inv"] = quantize(tensor, block)
        meant[name] = expected_bits(written[name], written[name + "_scale_inv"], block)
    values = json.loads((source / "config.json").read_text())
    write(
        folder,
        {"model.safetensors": written},
        values | {"quantization_config": config(weight_block_size=list(block))},
    )
    return {name: (bits, tensors[name]) for name, bits in meant.items()}
