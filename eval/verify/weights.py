"""Compares a model with its base, weight by weight, without either in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erase_concept.masks.mask import Mask
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import ModelConfigs
from erase_concept.pipelines.model import WeightsHash

Weights = Iterable[tuple[str, Tensor]]  # by their published names, in the order of the names


@dataclass(frozen=True)
class Compared:
    """A component beside the base model's.

    ``changed`` counts the weights of which any bit differs, as fp32, and ``outside`` those of them that the mask does
    not let change; ``first`` names the first parameter with such a weight. ``base`` and ``erased`` are the hashes of
    both as fp32, as ``weights_hash`` gives them. ``broken`` names the first parameter that is not finite.
    """

    part: str
    weights: int
    changed: int
    outside: int
    first: str
    broken: str
    base: str
    erased: str


def empty(model: ModelConfigs, part: str) -> nn.Module:
    """Return a component that has weights, without them: on the meta device, as its configuration describes it."""
    make = model.family.components[part].make
    assert make is not None  # asked for of components with weights alone
    with silence_hub_logs(), torch.device("meta"):
        return make(model.components[part])


def compare(
    part: str,
    base: Weights,
    erased: Weights,
    mask: Mask | None,
    *,
    frozen: bool = False,
    uncounted: tuple[str, ...] = (),
) -> Compared:
    """Compare a component with the base model's, bit by bit.

    Without a mask every weight may change, or none where the component is ``frozen``. Tensors whose names end as
    ``uncounted`` says are no weights. Raises ValueError when the two have not the same weights.
    """
    weights = changed = outside = 0
    first = broken = ""
    hashes = WeightsHash(torch.float32), WeightsHash(torch.float32)
    for name, before, after in _pairs(part, base, erased):
        for hashed, value in zip(hashes, (before, after), strict=True):
            hashed.add(name, value)
        if not broken and after.is_floating_point() and not bool(after.float().isfinite().all()):
            broken = name
        if uncounted and name.endswith(uncounted):
            continue
        differs = _bits(before) != _bits(after)
        count = int(differs.sum())
        weights, changed = weights + differs.numel(), changed + count
        wrong = count if frozen else 0
        if mask is not None and count:
            allowed = _allowed(mask, name)
            wrong = count if allowed is None else int((differs & ~allowed).sum())
        outside, first = outside + wrong, first or (name if wrong else "")
    return Compared(part, weights, changed, outside, first, broken, hashes[0].hexdigest(), hashes[1].hexdigest())


def first_difference(ours: Weights, theirs: Weights) -> str:
    """Return the name of the first weight that differs when ours is rounded to the dtype of theirs; "" for none.

    Weights that only one of them has differ.
    """
    try:
        return next((name for name, same, _ in _rounded(ours, theirs) if not same), "")
    except ValueError as problem:
        return str(problem)


def differences(ours: Weights, theirs: Weights) -> tuple[str, str]:
    """Return the first weight that differs as ``first_difference`` does, and the first of theirs that is not finite.

    All weights are looked at. Raises ValueError when the two have not the same weights.
    """
    first = broken = ""
    for name, same, finite in _rounded(ours, theirs):
        first, broken = first or ("" if same else name), broken or ("" if finite else name)
    return first, broken


def _rounded(ours: Weights, theirs: Weights) -> Iterator[tuple[str, bool, bool]]:
    """Yield for each weight whether ours, rounded to the dtype of theirs, is the same, and whether theirs is finite."""
    for name, mine, other in _pairs("", ours, theirs):
        finite = not other.is_floating_point() or bool(other.float().isfinite().all())
        yield name, torch.equal(_bits(mine.to(other.dtype)), _bits(other)), finite


def _pairs(part: str, ours: Weights, theirs: Weights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the weights of two models side by side; raises ValueError where one lacks a weight of the other."""
    left, right = iter(ours), iter(theirs)
    while True:
        one, two = next(left, None), next(right, None)
        if one is None and two is None:
            return
        if one is None or two is None or one[0] != two[0] or one[1].shape != two[1].shape:
            name = min(some[0] for some in (one, two) if some is not None)
            raise ValueError(f"{part and f'{part}: '}{name} is missing or has another shape in one of the two")
        yield one[0], one[1], two[1]


def _allowed(mask: Mask, name: str) -> Tensor | None:
    """Return where a mask lets a parameter change; None where not at all. transformers has two names for CLIP's."""
    own = next((one for one in (name, name.removeprefix("text_model.")) if one in mask.bits), None)
    return None if own is None else mask.dense(own)


def _bits(value: Tensor) -> Tensor:
    """Return the bits of a weight as fp32, in which a run counts changes; whole numbers stay as they are."""
    return value.float().contiguous().view(torch.int32) if value.is_floating_point() else value
