"""The moments of the masked optimizer, in fp32, bf16 or 8 bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.training.rules import State

_BLOCK = 256  # salient weights that share a scale in the 8-bit state


def zeros(count: int, state: State, device: torch.device, *, signed: bool) -> Any:
    """Return a moment of so many weights: a tensor, or in 8 bits a ``Coded``.

    Raises RequestError where the package for 8 bits is missing.
    """
    if state != "8bit":
        return torch.zeros(count, dtype=torch.float32 if state == "fp32" else torch.bfloat16, device=device)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError("settings.state", "8bit", 'needs bitsandbytes: pip install "erase-concept[8bit]"')
    return Coded(count, device, signed=signed)


class Coded:
    """A moment in 8 bits: a code for each weight, and a scale for each block of them."""

    def __init__(self, count: int, device: torch.device, *, signed: bool) -> None:
        from bitsandbytes.functional import create_dynamic_map

        self.map = create_dynamic_map(signed).to(device)
        self.codes = torch.zeros(count, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(-(-count // _BLOCK), device=device)

    def float(self) -> Tensor:
        """Return its values in fp32."""
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(self.codes, absmax=self.scales, code=self.map, blocksize=_BLOCK)

    def copy_(self, value: Tensor) -> None:
        """Take the values of a tensor, rounded to the nearest code."""
        from bitsandbytes.functional import quantize_blockwise

        codes, made = quantize_blockwise(value, code=self.map, blocksize=_BLOCK)
        self.codes.copy_(codes)
        self.scales.copy_(made.absmax)
