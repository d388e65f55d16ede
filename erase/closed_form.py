"""Closed forms: the keys and values of cross-attention that minimise a sum of squares, found exactly.

Keys and values are linear in the tokens of a prompt, so asking for those of some tokens to become those of others is a
least-squares problem in their matrices W [out, width], the present ones being W0:

    min over W   sum_i s_i |W c_i - W0 u_i|^2 + ridge |W - W0|^2

where token c_i is to get what token u_i has now: another one's to erase it, its own to preserve it. With
A = sum_i s_i c_i c_i^T + ridge I and B = W0 (sum_i s_i u_i c_i^T + ridge I) the minimiser is W = B A^-1.

With a mask it is the exact minimiser over the weights of the mask alone. The rows of W are independent of each other:
for row w with free weights S, the others F staying at w0, A_SS w_S = B_S - A_SF w0_F. In terms of the change d = w - w0
both cases are the same, A_SS d_S = r_S with R = W0 sum_i s_i (u_i - c_i) c_i^T, and this is what is solved here, in
float64. Rows with the same free weights share one factorisation: without a mask there is one for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.families.family import Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings

_UCE = "UCE's first code"


@settings
class ClosedFormSettings:
    """Settings that every closed form has."""

    erase_scale: Annotated[float, described("Weight of the tokens to erase.", ge=0, source=_UCE)] = 1.0
    preserve_scale: Annotated[float, described("Weight of all tokens of the retained prompts.", ge=0, source=_UCE)] = (
        0.1
    )
    ridge: Annotated[
        float, described("Weight of the change itself; it makes the solution unique.", gt=0, source=_UCE)
    ] = 0.5


@dataclass(frozen=True, eq=False)
class Demand:
    """Tokens [n, width] that are to get the keys and values that the ``wanted`` ones [n, width] have, with a weight."""

    tokens: Tensor
    wanted: Tensor
    scale: float


def matrices(unet: nn.Module, layers: Layers = UNET_LAYERS) -> dict[str, nn.Parameter]:
    """Return the matrices [out, width] that make cross-attention's keys and values, by name."""
    return {name: p for name, p in unet.named_parameters() if layers.is_key_or_value(name)}


def concept_tokens(
    model: Diffusion, data: ForgetRetain, becomes: Literal["anchor", "empty"], *, name: bool
) -> tuple[Tensor, Tensor]:
    """Return the tokens of the forget prompts that tell of the concept, and those they are to become, [n, width] each.

    These are the last token of the concept's name and all behind it to the very end, end tokens and padding included,
    for in a causal text encoder they all know the name; ``name`` False leaves out the name itself. The anchor's are
    taken from the same place of its own prompt on, those of the empty prompt from its first token on, and what reaches
    beyond the end of either is left out.
    """
    length = model.tokenizer.model_max_length  # what comes behind is XL's embedding of the whole prompt, and no token
    pairs = []
    for row, prompt in enumerate(data.forget):
        begin = int(data.forget_spans[row, 1]) - name
        other = data.uncond[0] if becomes == "empty" else data.remap[0, row]
        start = 0 if becomes == "empty" else int(data.anchor_spans[row, 1]) - name
        count = length - max(begin, start)
        pairs.append((prompt[begin : begin + count], other[start : start + count]))
    tokens, wanted = zip(*pairs, strict=True)
    return torch.cat(tokens), torch.cat(wanted)


def edit(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ClosedFormSettings,
    tokens: Tensor,
    wanted: Tensor,
) -> tuple[float, dict[str, float]]:
    """Erase tokens [n, width] and preserve all tokens of the retained prompts; return what ``minimise`` does."""
    kept = data.retain[:, : model.tokenizer.model_max_length].flatten(0, 1)
    demands = {
        "erase": Demand(tokens, wanted, settings.erase_scale),
        "preserve": Demand(kept, kept, settings.preserve_scale),
    }
    return minimise(model.unet, demands, settings.ridge, mask, model.family.layers)


@torch.no_grad()
def minimise(
    unet: nn.Module, demands: Mapping[str, Demand], ridge: float, mask: Mask | None, layers: Layers = UNET_LAYERS
) -> tuple[float, dict[str, float]]:
    """Set keys and values to the minimiser of the demands over the weights of the mask, all others untouched.

    Returns the objective's value and its terms without their weights s: for each demand sum |W c - W0 u|^2 over all
    matrices, and "change", sum |W - W0|^2. Raises RequestError when the mask leaves no key or value free.
    """
    weights = matrices(unet, layers)
    free = {
        name: torch.ones_like(w, dtype=torch.bool) if mask is None else mask.dense(name) for name, w in weights.items()
    }
    if not any(bool(some.any()) for some in free.values()):
        raise RequestError(
            "mask.kind",
            "(given)",
            "leaves no weight of cross-attention's keys and values free, and a closed form changes no others",
        )
    width = next(iter(weights.values())).shape[1]
    system, pull = ridge * torch.eye(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    sums = {}
    for name, demand in demands.items():
        tokens = demand.tokens.double().cpu()
        gap = demand.wanted.double().cpu() - tokens
        sums[name] = (tokens.T @ tokens, tokens.T @ gap, gap.T @ gap)
        system += demand.scale * sums[name][0]
        pull += demand.scale * sums[name][1].T
    whole = torch.linalg.cholesky(system)
    changed, crossed, given = (torch.zeros_like(system) for _ in range(3))
    for name, weight in weights.items():
        before = weight.double().cpu()
        change = _changes(system, whole, before @ pull, free[name].cpu())
        changed += change.T @ change
        crossed += change.T @ before
        given += before.T @ before
        weight.copy_(torch.where(free[name].to(weight.device), (before + change).to(weight), weight))
    # |W c - W0 u|^2 = |D c - W0 (u - c)|^2, summed over all rows of all matrices at once.
    terms = {
        name: float((cc * changed).sum() - 2 * (cg * crossed).sum() + (gg * given).sum())
        for name, (cc, cg, gg) in sums.items()
    }
    terms["change"] = float(changed.trace())
    scales = {name: demand.scale for name, demand in demands.items()} | {"change": ridge}
    return sum(scales[name] * value for name, value in terms.items()), terms


def _changes(system: Tensor, whole: Tensor, pulls: Tensor, free: Tensor) -> Tensor:
    """Solve A_SS d_S = r_S for each row r of ``pulls`` [rows, width]; ``whole`` is the Cholesky factor of all of A."""
    changes = torch.zeros_like(pulls)
    patterns, which = torch.unique(free, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows, own = (which == number).nonzero().squeeze(1), pattern.nonzero().squeeze(1)
        if len(own):
            factor = whole if len(own) == len(system) else torch.linalg.cholesky(system[own][:, own])
            changes[rows[:, None], own] = torch.cholesky_solve(pulls[rows][:, own].T, factor).T
    return changes
