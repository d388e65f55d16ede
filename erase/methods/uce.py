"""UCE, unified concept editing (Gandikota et al., WACV 2024, arXiv 2308.14761)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from erase_concept.closed_form import ClosedFormSettings, check_weights, concept_tokens, edit, retained_tokens
from erase_concept.data import ForgetRetain
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record


@settings
class UCESettings(ClosedFormSettings):
    """UCE's settings beside those of every closed form."""

    tokens: Annotated[
        Literal["name-to-end", "last"],
        described(
            "Tokens that are edited: the name's last one and all behind it, or that one alone.",
            source="UCE's first code; its later code edits the last one alone",
        ),
    ] = "name-to-end"


@method(
    "uce",
    UCESettings,
    summary="Gives the concept's tokens the keys and values of the anchor's, in closed form.",
    title="UCE",
    paper="arXiv 2308.14761",
    trains="keys and values of cross-attention",
    latents=(),
    scope="cross-attention",
    tuned_setting="erase_scale",
    memory=lambda settings: (),
    check=check_weights,
)
def uce(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: UCESettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record]:
    """Give the concept's tokens the keys and values of others in closed form, the retained prompts keeping theirs.

    W = (sum_i s W0 u_i c_i^T + l sum_p W0 c_p c_p^T + ridge W0) (sum_i s c_i c_i^T + l sum_p c_p c_p^T + ridge I)^-1
    for every key and value matrix of cross-attention, with the concept's tokens c_i, their targets u_i in the anchor's
    prompts, the tokens c_p of the retained prompts, and the scales s of erasing and l of preserving. In the authors'
    first code c_i are the last token of the name and all behind it, since padding is attended to as well and carries
    the concept too, and c_p are all tokens. In their later code both are the last token alone. Which token becomes
    which, ``concept_tokens`` says. With a mask it is the minimiser over its weights alone, see ``closed_form``. Nothing
    is drawn at random, so the seed changes nothing. It takes seconds, so there is no checkpoint.
    """
    began = time.perf_counter()
    kept = retained_tokens(model, data, settings.tokens)
    loss, terms = edit(model, data, mask, settings, *concept_tokens(model, data, settings.tokens), kept)
    yield Record(1, 1, loss, terms, 0.0, time.perf_counter() - began)
