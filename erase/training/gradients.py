"""Gradients that a method changes before the step: computed where weights may change, projected, handed on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from erase_concept.masks.mask import Mask


def salient_gradient(loss: Tensor, module: nn.Module, mask: Mask | None) -> dict[str, Tensor]:
    """Return a loss's gradient by parameter, zero in weights that the mask freezes.

    Only parameters that require one are in it. The loss's graph is gone afterwards, and no ``grad`` is set.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    if mask is not None:
        found = tuple(g * mask.dense(name).to(g.device) for name, g in zip(named, found, strict=True))
    return dict(zip(named, found, strict=True))


def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Return the dot product of two gradients, over the parameters of the first one."""
    return torch.stack([(g * other[name]).sum() for name, g in one.items()]).sum()


def onto_half_space(
    gradient: Mapping[str, Tensor], normal: Mapping[str, Tensor], at_least: float | Tensor = 0.0
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the nearest vector to a gradient whose dot product with ``normal`` is ``at_least`` or more.

    That is gradient + l normal with  l = max(0, (at_least - <gradient, normal>) / |normal|^2), the solution of the
    quadratic programme of gradient episodic memory (arXiv 1706.08840) for a single constraint. Returns l as well.
    """
    square = torch.stack([normal[name].square().sum() for name in gradient]).sum()
    if square == 0:
        return dict(gradient), square
    factor = ((at_least - dot(gradient, normal)) / square).clamp(min=0)
    return {name: g + factor * normal[name] for name, g in gradient.items()}, factor


def with_gradient(loss: Tensor, module: nn.Module, gradient: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor with the loss's value, whose backward pass gives exactly the given gradient."""
    named = dict(module.named_parameters())
    carrier = torch.stack([(g.detach() * named[name]).sum() for name, g in gradient.items()]).sum()
    return loss.detach() + (carrier - carrier.detach())
