"""Masks of exactly k ones.

A mask of 860 million weights takes 107 MB and two passes over the scores. The k-th largest score is found by counting
bit patterns, since a non-negative float orders like the integer with the same bits: nothing is sorted, copied or
concatenated. The processes of a distributed run exchange counts instead of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from erase_concept.masks.mask import Mask, all_ones, expand_to
from erase_concept.masks.scopes import in_scope
from erase_concept.pipelines.families.family import Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS

_CHUNK = 1 << 18  # scores looked at together: what is made of them stays in the cache, and needs no new pages
_LOW_BITS = 16

# Given one process's counts int64 [m], return those of all processes int64 [processes, m], and the own place in them.
Exchange = Callable[[Tensor], tuple[Tensor, int]]


def alone(counts: Tensor) -> tuple[Tensor, int]:
    """Exchange counts in a run of a single process."""
    return counts[None], 0


def keep_count(density: float, total: int) -> int:
    """Return how many of ``total`` weights a mask of this density keeps, rounded to the nearest."""
    return round(density * total)


def top_k(scores: Mapping[str, Tensor], k: int, *, exchange: Exchange = alone) -> Mask:
    """Return the mask of exactly k ones over the k largest scores of all parameters taken together.

    ``scores`` are non-negative float tensors by parameter name. Among equal scores the earlier ones win, in the order
    of the mapping and within it of the flattened tensor. In a distributed run each rank holds a consecutive share of
    every flattened parameter, k is counted over all of them, and ``exchange`` gathers the ranks' counts. The mask is
    then that of the rank's shares.

    Raises ValueError when k is out of range or a score is negative or not a number.
    """
    sizes, rank = exchange(torch.tensor([sum(s.numel() for s in scores.values())]))
    total = int(sizes.sum())
    if not 0 <= k <= total:
        raise ValueError(f"k must be between 0 and {total}, not {k}")
    high, above = _find(scores, k, exchange, lambda bits: bits >> _LOW_BITS, 1 << 15, check=True)
    low, above = _find(
        scores,
        k,
        exchange,
        lambda bits: (bits & 0xFFFF)[bits >> _LOW_BITS == high],
        1 << _LOW_BITS,
        already=above,
    )
    threshold = (high << _LOW_BITS) | low
    earlier = _earlier_ties(scores, threshold, exchange)[:, rank].tolist() if len(sizes) > 1 else None
    wanted = k - above  # of the weights at the threshold, the first ones
    packed = {}
    for place, (name, score) in enumerate(scores.items()):
        parts = []
        if earlier is not None:
            wanted = k - above - earlier[place]
        for bits in _patterns(score):
            chosen, equal = bits > threshold, bits == threshold
            chosen |= equal & (equal.cumsum(0) <= wanted)
            wanted -= int(equal.sum())
            parts.append(np.packbits(chosen.numpy()))
        packed[name] = torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.uint8))
    return Mask(packed, {name: tuple(score.shape) for name, score in scores.items()})


def _earlier_ties(scores: Mapping[str, Tensor], threshold: int, exchange: Exchange) -> Tensor:
    """Return how many scores at the threshold come before each parameter's share, int64 [parameters, processes]."""
    own = [sum(int((bits == threshold).sum()) for bits in _patterns(score)) for score in scores.values()]
    ties = exchange(torch.tensor(own, dtype=torch.int64))[0].T
    return (ties.flatten().cumsum(0) - ties.flatten()).view(ties.shape)


def _patterns(score: Tensor) -> Iterator[Tensor]:
    """Yield a score's bit patterns as int32, piece by piece."""
    flat = score.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        # Adding zero turns -0.0, whose pattern is negative, into 0.0.
        yield (flat[start : start + _CHUNK].float().cpu() + 0.0).view(torch.int32)


def _find(
    scores: Mapping[str, Tensor],
    k: int,
    exchange: Exchange,
    digit: Callable[[Tensor], Tensor],
    size: int,
    *,
    already: int = 0,
    check: bool = False,
) -> tuple[int, int]:
    """Return the digit at which counting from the largest down reaches k, and how many scores lie above it."""
    counts = torch.zeros(size, dtype=torch.int64)
    infinity = 0x7F800000
    for name, score in scores.items():
        for bits in _patterns(score):
            if check and bool(((bits < 0) | (bits > infinity)).any()):
                raise ValueError(f"scores must be numbers of at least 0, and {name} has others")
            counts += torch.bincount(digit(bits), minlength=size)
    counts = exchange(counts)[0].sum(0)
    reached = already + counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, k)) if k > already else 0
    place = min(place, size - 1)
    value = size - 1 - place
    return value, int(reached[place]) - int(counts[value])


def bottom_k(scores: Mapping[str, Tensor], k: int, *, exchange: Exchange = alone) -> Mask:
    """Return the mask of exactly k ones over the k smallest scores; ``exchange`` is as in ``top_k``."""
    total = int(exchange(torch.tensor([sum(score.numel() for score in scores.values())]))[0].sum())
    top = top_k(scores, total - k, exchange=exchange)
    return Mask((all_ones(top.shapes) - top).bits, top.shapes)


def random(model: nn.Module, density: float, seed: int, scope: str = "full", layers: Layers = UNET_LAYERS) -> Mask:
    """Return a mask over a random choice of the scope's weights, a share of them: the control for saliency."""
    return expand_to(random_of(in_scope(model, scope, layers), density, seed), model)


def random_of(shapes: Mapping[str, tuple[int, ...]], density: float, seed: int) -> Mask:
    """Return a mask over a random choice of the weights of these shapes, a share of them."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return top_k(scores, keep_count(density, sum(s.numel() for s in scores.values())))
