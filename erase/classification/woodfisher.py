"""WoodFisher: the inverse of an empirical Fisher matrix times a vector (Singh and Alistarh, arXiv 2004.14340)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def woodfisher(v: Tensor, gradients: Iterable[Tensor], n: float) -> Tensor:
    """Return k:  k = v, o = g_0;  for each later g:  k -= (k g) / (n + o g) o,  o -= (o g) / (n + o g) o."""
    k, o = v.clone(), torch.zeros_like(v)
    for place, g in enumerate(gradients):
        if place == 0:
            o = g.clone()
            continue
        og = o @ g
        k -= (k @ g) / (n + og) * o
        o -= og / (n + og) * o
    return k
