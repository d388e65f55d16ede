"""The soft threshold of a proximal step: changes of weights shrink, and small ones go back to zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def shrink(module: nn.Module, base: Mapping[str, Tensor], threshold: float) -> None:
    """Draw every weight towards its base by a threshold, in place; one that is within it gets the base's very bits."""
    for name, p in module.named_parameters():
        change = nn.functional.softshrink(p - base[name], threshold)
        p.copy_(torch.where(change == 0, base[name], base[name] + change))
