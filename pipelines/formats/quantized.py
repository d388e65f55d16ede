"""Quantised weights: fp8 with scales is turned back into plain floats, every other kind is refused by its name.

Names by which programs store the scale of the fp8 weight ``X.weight``: ``X.scale_weight`` (ComfyUI's first "scaled
fp8"), ``X.weight_scale`` (ComfyUI since, compressed-tensors) and ``X.weight_scale_inv`` (fine-grained fp8, in blocks).
The weight is the stored value times the scale, whatever the name says. Scales of a layer's input (``scale_input``,
``input_scale``) speed up its arithmetic and change no weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.files import parse_json

METADATA = "_quantization_metadata"  # where ComfyUI names the format of each layer
_FP8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
_FORMATS = {"float8_e4m3fn", "float8_e5m2"}  # of ComfyUI's, that are one number times a scale
_BLOCK = 128  # the side of a block, of which those at the edges are cut off
_MOST_SAID = 4096  # bytes of what a layer says of its format
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_NO_WEIGHTS = re.compile(r"(?:^|\.)(?:scale_input|input_scale|scale_output|output_scale|scaled_fp8|comfy_quant)$")
_KINDS = (  # what a name in the file tells, the first that fits
    (re.compile(r"\.quant_state\.bitsandbytes__nf4$"), "nf4 of bitsandbytes"),
    (re.compile(r"\.quant_state\.bitsandbytes__fp4$|\.weight\.(?:absmax|quant_map)$"), "4 bits of bitsandbytes"),
    (re.compile(r"\.SCB$|\.weight_format$"), "int8 of bitsandbytes"),
    (re.compile(r"\.(?:qweight|qzeros|wscales)$"), "packed integers of GPTQ, AWQ or SVDQuant"),
    (re.compile(r"\.weight\._(?:data|scale)$"), "the kind of optimum-quanto"),
    (re.compile(r"\.weight_scale_2$"), "nvfp4"),
)
_SCALE_LIKE = re.compile(r"(?:^|[._])(?:scales?|scalar|absmax|zero_point)(?:[._]|$)")


def dequantized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path) -> dict[str, Tensor]:
    """Return a file's tensors as plain floats: scaled fp8 weights times their scales in fp32, all others as they are.

    Raises RequestError naming the kind of quantisation where it is another one.
    """
    _check_kinds(tensors, metadata, file)
    plain = {key: value for key, value in tensors.items() if not _NO_WEIGHTS.search(key)}
    for key in list(plain):
        module, _, own = key.rpartition(".")
        weight = f"{module}.weight"
        if own in _SCALES and weight in tensors:
            plain[weight] = _scaled(weight, plain[weight], key, plain.pop(key), file)
    fp8 = {key.removesuffix(".weight") for key, value in tensors.items() if value.dtype in _FP8}
    for key in plain:
        module = key.rpartition(".")[0].removesuffix(".weight")
        if module in fp8 and _SCALE_LIKE.search(key[len(module) :]):
            raise RequestError("model", file, f"has scaled fp8 weights, and {key} is no scale that is known here")
    return plain


def _check_kinds(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path) -> None:
    """Raise RequestError for a kind of quantisation that is not fp8."""
    formats = set(re.findall(r'"format":\s*"(\w+)"', metadata.get(METADATA, "")))
    for key, value in tensors.items():
        if key.endswith(".comfy_quant"):
            try:
                if value.dtype != torch.uint8 or value.ndim != 1 or len(value) > _MOST_SAID:
                    raise ValueError("it is no short text")
                formats.add(str(parse_json(bytes(value.tolist()).decode())["format"]))
            except (ValueError, TypeError, LookupError):
                formats.add(f"an unknown format ({key})")
    kinds = sorted(formats - _FORMATS)
    kinds += [kind for mark, kind in _KINDS if any(mark.search(key) for key in tensors)]
    for key, value in tensors.items():
        if key.endswith(".weight") and not value.is_floating_point():
            kinds.append(f"{str(value.dtype).removeprefix('torch.')} ({key})")
            break
    if kinds:
        what = f"its weights are quantised: {kinds[0]}; a checkpoint in fp32, fp16, bf16 or fp8 is needed"
        raise RequestError("model", file, what)


def _scaled(name: str, weight: Tensor, scale_name: str, scale: Tensor, file: Path) -> Tensor:
    """Return a weight times its scale: one for all, one for each output (row), or one for each block of a matrix."""
    if weight.dtype not in _FP8:
        if not bool((scale.float() == 1).all()):
            raise RequestError("model", file, f"has {scale_name}, but {name} is {weight.dtype}, no fp8")
        return weight
    value, factor = weight.float(), scale.float()
    if factor.numel() == 1:
        return value * factor.reshape(())
    if value.ndim and factor.shape[0] == len(value) and factor.numel() == len(value):
        return value * factor.reshape(-1, *[1] * (value.ndim - 1))
    if scale_name.endswith("_inv") and list(factor.shape) == [-(-side // _BLOCK) for side in value.shape]:
        spread = factor.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
        return value * spread[: value.shape[0], : value.shape[1]]
    raise RequestError("model", file, f"{scale_name} {list(scale.shape)} does not fit {name} {list(weight.shape)}")
