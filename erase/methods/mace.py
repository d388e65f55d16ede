"""MACE's closed-form refinement of cross-attention (Lu et al., CVPR 2024, arXiv 2403.06135)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from erase_concept.closed_form import ClosedFormSettings, concept_tokens, edit, retained_tokens
from erase_concept.data import ForgetRetain
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record


@settings
class MACESettings(ClosedFormSettings):
    """The settings of MACE's closed form."""

    ridge: Annotated[float, described(source="the authors' recipes for single objects")] = 1000.0


@method(
    "mace",
    MACESettings,
    summary="Takes the concept out of the tokens behind its name, in closed form: the first of MACE's three parts.",
    title="MACE, closed form",
    paper="arXiv 2403.06135",
    trains="keys and values of cross-attention",
    latents=(),
    scope="cross-attention",
    tuned_setting="erase_scale",
    memory=lambda settings: (),
)
def mace(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: MACESettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record]:
    """Take the concept out of the tokens behind its name, in closed form: the first of MACE's three parts.

    Minimises  sum |W e_f - W0 e_g|^2 + l sum |W e_p - W0 e_p|^2 + ridge |W - W0|^2  for every key and value matrix of
    cross-attention: e_f the tokens behind the name in the concept's prompts, end tokens and padding included, e_g the
    same words' tokens in the anchor's prompts, e_p all tokens of the retained prompts. The text encoder is causal, so
    words before the name carry nothing of it. The name's own tokens are left as they are: MACE then trains a LoRA
    against them, and merges the LoRAs of many concepts by a formula. Neither is done here. With a mask it is the
    minimiser over its weights alone, see ``closed_form``. Nothing is drawn at random.
    """
    began = time.perf_counter()
    loss, terms = edit(
        model, data, mask, settings, *concept_tokens(model, data, "behind-name"), retained_tokens(model, data)
    )
    yield Record(1, 1, loss, terms, 0.0, time.perf_counter() - began)
