"""Closed forms: the keys and values of cross-attention that minimise a sum of squares, found exactly.

Keys and values are linear in the tokens of a prompt, so asking for those of some tokens to become those of others is a
least-squares problem in their matrices W [out, width], the present ones being W0:

    min over W   sum_i s_i |W c_i - V_i u_i|^2 + ridge |W - W0|^2

where token c_i is to get what the matrices V_i make of token u_i. V_i is W0 in most cases: another token's keys and
values to erase it, its own to preserve it. With A = sum_i s_i c_i c_i^T + ridge I and B = sum_i s_i V_i u_i c_i^T +
ridge W0 the minimiser is W = B A^-1.

With a mask it is the exact minimiser over the weights of the mask alone. The rows of W are independent of each other:
for row w with free weights S, the others F staying at w0, A_SS w_S = B_S - A_SF w0_F. In terms of the change d = w - w0
both cases are the same, A_SS d_S = r_S with R = sum_i s_i (V_i u_i - W0 c_i) c_i^T, and this is what is solved here, in
float64. Rows with the same free weights share one factorisation: without a mask there is one for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn

from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.masks.scopes import SCOPES, WITHOUT_KEYS_AND_VALUES
from erase_concept.pipelines.families.family import Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings

if TYPE_CHECKING:
    from erase_concept.recipe import Recipe

_UCE = "UCE's first code"
_NONE_FREE = "leaves no weight of cross-attention's keys and values free, and a closed form changes no others"
# Without a ridge, directions in which no token has anything would be noise divided by noise: they get this much of one,
# relative to A's mean diagonal.
_LEAST = 1e-9
# Which of a prompt's tokens are edited; see ``concept_tokens``.
Places = Literal["all", "around-name", "behind-name", "name-to-end", "last"]


@settings
class ClosedFormSettings:
    """Settings that every closed form has."""

    erase_scale: Annotated[float, described("Weight of the tokens to erase.", ge=0, source=_UCE)] = 1.0
    preserve_scale: Annotated[
        float | None,
        described(
            "Weight of all tokens of the n retained prompts; not given, it is 1/n and at least 0.1.",
            ge=0,
            source=_UCE,
        ),
    ] = None
    ridge: Annotated[
        float,
        described(
            "Weight of the change itself, which makes the solution unique; 0 is the least change of all solutions.",
            ge=0,
            source=_UCE,
        ),
    ] = 0.5


@dataclass(frozen=True, eq=False)
class Demand:
    """Tokens [n, width] that are to get the keys and values of the ``wanted`` ones [n, width], with a weight.

    ``by`` are the matrices [out, width] that make the wanted keys and values, by name; without them the present ones.
    """

    tokens: Tensor
    wanted: Tensor
    scale: float
    by: Mapping[str, Tensor] | None = None


def matrices(unet: nn.Module, layers: Layers = UNET_LAYERS) -> dict[str, nn.Parameter]:
    """Return the matrices [out, width] that make cross-attention's keys and values, by name."""
    return {name: p for name, p in unet.named_parameters() if layers.is_key_or_value(name)}


def check_weights(recipe: Recipe) -> None:
    """Raise RequestError for a scope or a file of a mask that leaves no key or value free."""
    kind, scope = recipe.mask.kind, recipe.mask.scope
    if scope in WITHOUT_KEYS_AND_VALUES:
        allowed = ", ".join(one for one in SCOPES if one not in WITHOUT_KEYS_AND_VALUES)
        raise RequestError("mask.scope", scope, f"{_NONE_FREE}; allowed: {allowed}")
    if (file := Path(kind)).is_file():
        free = (ones for name, (ones, _) in Mask.load(file).layers().items() if UNET_LAYERS.is_key_or_value(name))
        if not any(free):
            raise RequestError("mask.kind", kind, _NONE_FREE)


def concept_tokens(
    model: Diffusion, data: ForgetRetain, places: Places, part: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the tokens of the forget prompts that are edited, and those they are to become, [n, width] each.

    A prompt's tokens are paired with those of its anchor prompt, counted from where each names what it is about:

        name-to-end  the name's last token, and all behind it to the very end, end token and padding included
        last         the name's last token alone
        behind-name  all behind the name
        around-name  all behind the name, and all with which both prompts begin
        all          every token with the one at the same place

    A causal text encoder tells tokens of what stands before them, so those from the name's last token on know the name.
    Where the anchor's name is not in its prompt, the last word stands for it. The empty prompt has no word: the start
    token stands for its name's last one, as in UCE's code, so that a bare name's end token gets the empty prompt's end
    token, and its padding the padding. What reaches beyond the end of either prompt is left out, and so is XL's
    embedding of the whole prompt, which is no token. ``part`` takes the prompts of one concept alone.
    """
    length = model.tokenizer.model_max_length
    pairs = []
    for row, prompt in enumerate(data.forget):
        if part is not None and int(data.forget_parts[row]) != part:
            continue
        other = data.remap[0, row]
        begin, start = int(data.forget_spans[row, 1]), int(data.anchor_spans[row, 1])
        if places == "around-name":
            same = int((data.forget_ids[row] == data.anchor_ids[row]).int().cumprod(0).sum())
            same = min(same, int(data.forget_spans[row, 0]))
            pairs.append((prompt[:same], other[:same]))
        if places == "all":
            begin = start = 0
        elif places in ("name-to-end", "last"):
            begin, start = begin - 1, start - 1
        count = 1 if places == "last" else length - max(begin, start)
        pairs.append((prompt[begin : begin + count], other[start : start + count]))
    tokens, wanted = zip(*pairs, strict=True)
    return torch.cat(tokens), torch.cat(wanted)


def retained_tokens(model: Diffusion, data: ForgetRetain, places: Places = "all") -> Tensor:
    """Return the tokens [n, width] of the retained prompts: every one, or of each its last before the end token."""
    length = model.tokenizer.model_max_length
    if places != "last":
        return data.retain[:, :length].flatten(0, 1)
    last = (data.retain_ids == model.tokenizer.eos_token_id).int().argmax(1) - 1
    return data.retain[torch.arange(len(last)), last]


def edit(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ClosedFormSettings,
    tokens: Tensor,
    wanted: Tensor,
    kept: Tensor,
) -> tuple[float, dict[str, float]]:
    """Erase tokens [n, width] and preserve the ``kept`` ones [m, width]; return what ``minimise`` does."""
    scale = settings.preserve_scale
    if scale is None:
        scale = max(0.1, 1 / len(data.retain))
    demands = {"erase": Demand(tokens, wanted, settings.erase_scale), "preserve": Demand(kept, kept, scale)}
    return minimise(model.unet, demands, settings.ridge, mask, model.family.layers)


@torch.no_grad()
def minimise(
    unet: nn.Module, demands: Mapping[str, Demand], ridge: float, mask: Mask | None, layers: Layers = UNET_LAYERS
) -> tuple[float, dict[str, float]]:
    """Set keys and values to the minimiser of the demands over the weights of the mask, all others untouched.

    Returns the objective's value and its terms without their weights s: for each demand sum |W c - V u|^2 over all
    matrices, and "change", sum |W - W0|^2. Without a ridge it is the least change of all minimisers. Raises
    RequestError when the mask leaves no key or value free.
    """
    weights = matrices(unet, layers)
    free = {
        name: torch.ones_like(w, dtype=torch.bool) if mask is None else mask.dense(name) for name, w in weights.items()
    }
    if not any(bool(some.any()) for some in free.values()):
        raise RequestError("mask.kind", "(given)", _NONE_FREE)
    width = next(iter(weights.values())).shape[1]
    system, pull = ridge * torch.eye(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    sums = {}
    for name, demand in demands.items():
        tokens = demand.tokens.double().cpu()
        gap = demand.wanted.double().cpu() - tokens
        sums[name] = (tokens.T @ tokens, tokens.T @ gap, gap.T @ gap)
        system += demand.scale * sums[name][0]
        pull += demand.scale * sums[name][1].T
    if not ridge:
        system += _LEAST * system.trace() / width * torch.eye(width, dtype=torch.float64)
    whole = torch.linalg.cholesky(system)
    # V = W0 + E, so |W c - V u|^2 = |(D - E) c - (W0 + E) (u - c)|^2, summed over all rows of all matrices at once. The
    # demands by the present matrices, where E is zero, share their sums.
    grams = {key: torch.zeros(3, width, width, dtype=torch.float64) for key in ("", *_own(demands))}
    for name, weight in weights.items():
        before = weight.double().cpu()
        extra = {key: by[name].double().cpu() - before for key, by in _own(demands).items()}
        pulls = before @ pull
        for key, more in extra.items():
            pulls = pulls + demands[key].scale * more @ (sums[key][0] + sums[key][1]).T
        change = _changes(system, whole, pulls, free[name].cpu())
        for key, gram in grams.items():
            moved, present = (change - extra[key], before + extra[key]) if key else (change, before)
            gram.add_(torch.stack([moved.T @ moved, moved.T @ present, present.T @ present]))
        weight.copy_(torch.where(free[name].to(weight.device), (before + change).to(weight), weight))
    terms = {}
    for name, (cc, cg, gg) in sums.items():
        changed, crossed, given = grams[name if name in grams else ""]
        terms[name] = float((cc * changed).sum() - 2 * (cg * crossed).sum() + (gg * given).sum())
    terms["change"] = float(grams[""][0].trace())
    scales = {name: demand.scale for name, demand in demands.items()} | {"change": ridge}
    return sum(scales[name] * value for name, value in terms.items()), terms


def _own(demands: Mapping[str, Demand]) -> dict[str, Mapping[str, Tensor]]:
    """Return the matrices of the demands that have their own."""
    return {name: demand.by for name, demand in demands.items() if demand.by is not None}


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
