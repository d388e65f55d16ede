"""RECE, reliable and efficient concept erasure (Gong et al., ECCV 2024, arXiv 2407.12383)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from erase_concept.closed_form import check_weights, concept_tokens, edit, matrices, retained_tokens
from erase_concept.data import ForgetRetain
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.methods.uce import UCESettings
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record

_CODE = "the authors' code for objects"


@settings
class RECESettings(UCESettings):
    """RECE's settings beside UCE's, with which it begins."""

    epochs: Annotated[int, described("Rounds after UCE's edit.", ge=1, source=_CODE)] = 1
    regular_scale: Annotated[
        float, described("How small the tokens are kept that would bring the concept back.", gt=0, source=_CODE)
    ] = 1e-3
    round_tokens: Annotated[
        Literal["all", "name-to-end"],
        described("Tokens of a round: the whole prompt, or the name's last one and all behind it.", source=_CODE),
    ] = "all"
    round_preserve_scale: Annotated[
        float, described("Weight of all tokens of the retained prompts in a round.", ge=0, source=_CODE)
    ] = 0.1
    round_ridge: Annotated[float, described("Weight of the change itself in a round.", ge=0, source=_CODE)] = 0.1


@method(
    "rece",
    RECESettings,
    summary="Edits as UCE does, then finds the tokens that would bring the concept back and edits those, in rounds.",
    title="RECE",
    paper="arXiv 2407.12383",
    trains="keys and values of cross-attention",
    latents=(),
    scope="cross-attention",
    tuned_setting="erase_scale",
    memory=lambda settings: (),
    check=check_weights,
)
def rece(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: RECESettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record]:
    """Edit as UCE does, then in rounds find the tokens that would bring the concept back, and edit those too.

    The token for which the edited model's keys and values are closest to the base model's (W*) for c is

        c' = argmin sum_j |W_j c' - W*_j c|^2 + regular_scale |c'|^2
           = (regular_scale I + sum_j W_j^T W_j)^-1 (sum_j W_j^T W*_j) c        over all matrices j,

    and each round gives every c' the target of its c, by UCE's formula with the weights of the round before as W0, and
    with scales of the rounds' own. c are all tokens of the prompts, in the authors' presets the name alone, and their
    targets those at the same places of the anchor's prompts. The authors keep the round in which a detector finds
    least; here the last one is kept. With a mask each round is the minimiser over its weights alone. Nothing is drawn
    at random.
    """
    began = time.perf_counter()
    base = {
        name: weight.detach().to("cpu", torch.float64, copy=True)
        for name, weight in matrices(model.unet, model.family.layers).items()
    }
    kept = retained_tokens(model, data, settings.tokens)
    loss, terms = edit(model, data, mask, settings, *concept_tokens(model, data, settings.tokens), kept)
    yield Record(1, settings.epochs + 1, loss, terms, 0.0, time.perf_counter() - began)
    concept, wanted = concept_tokens(model, data, settings.round_tokens)
    rounds = replace(settings, preserve_scale=settings.round_preserve_scale, ridge=settings.round_ridge)
    for turn in range(1, settings.epochs + 1):
        tokens = regained(model, base, concept, settings.regular_scale)
        loss, terms = edit(model, data, mask, rounds, tokens, wanted, retained_tokens(model, data))
        yield Record(turn + 1, settings.epochs + 1, loss, terms, 0.0, time.perf_counter() - began)


def regained(model: Diffusion, base: Mapping[str, Tensor], concept: Tensor, regular_scale: float) -> Tensor:
    """Return the tokens [n, width] that bring back the base model's keys and values for the concept's [n, width]."""
    system = regular_scale * torch.eye(concept.shape[1], dtype=torch.float64)
    mixed = torch.zeros_like(system)
    for name, weight in matrices(model.unet, model.family.layers).items():
        now = weight.detach().double().cpu()
        system += now.T @ now
        mixed += now.T @ base[name]
    return torch.linalg.solve(system, mixed @ concept.double().T).T
