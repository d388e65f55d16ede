"""The kinds of masks: the most or the least salient weights, random ones, or all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import or_

from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask, all_ones
from erase_concept.masks.shares import counts_of_all, joined
from erase_concept.masks.top_k import bottom_k, keep_count, random_of, top_k
from erase_concept.pipelines.processes import processes

MASK_KINDS = ("salient", "none", "random", "least-salient")
RANKED = ("salient", "least-salient")  # the kinds that need the weights' saliency

Shapes = Mapping[str, tuple[int, ...]]
Saliency = Callable[[], Iterable[Mapping[str, Tensor]]]


def choose(kind: str, sparsity: float, shapes: Shapes, saliency: Saliency, seed: int) -> Mask:
    """Return the mask of one of ``MASK_KINDS`` over parameters of these shapes, of which ``sparsity`` stay frozen.

    ``saliency`` returns the saliency of every weight, and of more; of several processes, each one's own share of it.
    Where it returns several, each has a mask of that sparsity, and the result is their union. All weights are ranked
    together. ``seed`` is that of a random choice.
    Raises RequestError when the sparsity leaves no weight to change.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    k = keep_count(1 - sparsity, total)
    if k == 0:
        raise RequestError("mask.sparsity", sparsity, f"leaves none of {total} weights to change")
    if kind == "none":
        return all_ones(shapes)
    if kind == "random":
        return random_of(shapes, 1 - sparsity, seed)
    best = top_k if kind == "salient" else bottom_k
    ranked = ({name: scores[name] for name in shapes} for scores in saliency())
    if processes().num_processes == 1:
        return reduce(or_, (best(scores, k) for scores in ranked))
    return reduce(or_, (joined(best(scores, k, exchange=counts_of_all), shapes) for scores in ranked))
