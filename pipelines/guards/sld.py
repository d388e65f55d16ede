"""SLD, safe latent diffusion (Schramowski et al., CVPR 2023, arXiv 2211.05105), in the paper's four configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from erase_concept.pipelines.guards import GUARDS
from erase_concept.pipelines.guards.guard import Guard, Predict, classifier_free, encode_names
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings

_PAPER = "arXiv 2211.05105"
# What the authors' code guides away from, one text for all of it.
UNSAFE = (
    *("hate", "harassment", "violence", "suffering", "humiliation", "harm", "suicide", "sexual", "nudity"),
    *("bodily fluids", "blood", "obscene gestures", "illegal activity", "drug use", "theft", "vandalism", "weapons"),
    *("child abuse", "brutality", "cruelty"),
)
_TERMS = {kind: (f"an image showing {', '.join(UNSAFE)}",) for kind in ("nudity", "unsafe")}

Scale = Annotated[float, described("How strongly to guide away from the concept; 0 is no guard.", ge=0, source=_PAPER)]
Warmup = Annotated[int, described("Steps before it begins, of 50 sampling steps.", ge=0, source=_PAPER)]
Threshold = Annotated[
    float, described("It acts where the prompt's prediction is below the concept's plus this.", source=_PAPER)
]
MomentumScale = Annotated[float, described("Weight of the momentum.", ge=0, source=_PAPER)]
Terms = Annotated[
    str,
    described(
        "What to guide away from, with commas between; not given, the authors' twenty terms for nudity and other "
        "unsafe content, and the names of any other concept.",
        source="the authors' code",
    ),
]
MomentumBeta = Annotated[float, described("Share of the momentum that a step keeps.", ge=0, le=1, source=_PAPER)]


@settings
class SLD:
    """The settings of SLD; the defaults are the paper's "medium"."""

    scale: Scale = 1000.0
    warmup: Warmup = 10
    threshold: Threshold = 0.01
    momentum_scale: MomentumScale = 0.3
    momentum_beta: MomentumBeta = 0.4
    terms: Terms = ""


@settings
class SLDWeak(SLD):
    """The paper's "weak"."""

    scale: Scale = 200.0
    warmup: Warmup = 15
    threshold: Threshold = 0.0
    momentum_scale: MomentumScale = 0.0
    momentum_beta: MomentumBeta = 0.0


@settings
class SLDWeakInDiffusers(SLDWeak):
    """The "weak" of diffusers' own pipeline."""

    scale: Scale = 20.0


@settings
class SLDStrong(SLD):
    """The paper's "strong"."""

    scale: Scale = 2000.0
    warmup: Warmup = 7
    threshold: Threshold = 0.025
    momentum_scale: MomentumScale = 0.5
    momentum_beta: MomentumBeta = 0.7


@settings
class SLDMax(SLD):
    """The paper's "max"."""

    scale: Scale = 5000.0
    warmup: Warmup = 0
    threshold: Threshold = 1.0
    momentum_scale: MomentumScale = 0.5
    momentum_beta: MomentumBeta = 0.7


def safe_latent_diffusion(
    model: Diffusion,
    names: Sequence[str],
    settings: SLD,
    embeddings: Tensor,
    uncond: Tensor,
    scale: Tensor,
    steps: int,
) -> Predict:
    """Guide away from the concept where the prompt comes near it.

    With the predictions e for the empty prompt, e_p for the prompt and e_s for the concept's names, and the guidance
    scale g, the guided prediction is

        e + g (e_p - e - y)    y = m (e_s - e) + momentum_scale v    v becomes momentum_beta v + (1 - momentum_beta) y

    where m, for each element, is min(1, scale |e_p - e_s|) where e_p - e_s < threshold, and 0 elsewhere. The paper
    writes max(1, ...), which has no bound; its code computes the minimum. In the first steps y is left out, while v
    already grows. They are the same share of the sampling as in the paper, whatever the number of steps. Everything is
    in the model's own prediction type. Scale 0 is plain guidance, as in the authors' code.
    """
    if settings.scale == 0:
        return classifier_free(model, names, settings, embeddings, uncond, scale, steps)
    unsafe_prompt = encode_names(model, names, uncond).expand_as(embeddings)
    prompts = torch.cat([uncond.expand_as(embeddings), embeddings, unsafe_prompt])
    momentum = torch.zeros((), device=embeddings.device)

    def predict(noisy: Tensor, timestep: Tensor, step: int) -> Tensor:
        nonlocal momentum
        thrice = timestep.to(noisy.device).expand(len(prompts))
        without, given, unsafe = model.predict(noisy.repeat(3, 1, 1, 1), thrice, prompts).chunk(3)
        gap = given - unsafe
        near = (settings.scale * gap.abs()).clamp(max=1) * (gap < settings.threshold)
        away = near * (unsafe - without) + settings.momentum_scale * momentum
        momentum = settings.momentum_beta * momentum + (1 - settings.momentum_beta) * away
        guided = given - without
        if 50 * step >= settings.warmup * steps:
            guided = guided - away
        return without + scale * guided

    return predict


for _name, _whose, _settings in (
    ("weak", "the paper's weak", SLDWeak),
    ("weak-diffusers", "the weak of diffusers' own pipeline", SLDWeakInDiffusers),
    ("medium", "the paper's medium", SLD),
    ("strong", "the paper's strong", SLDStrong),
    ("max", "the paper's max", SLDMax),
):
    GUARDS.add(
        Guard(
            f"sld-{_name}",
            f"Guide away from the concept where the prompt comes near it; {_whose}.",
            _settings,
            guide=safe_latent_diffusion,
            paper=_PAPER,
            terms=_TERMS,
        )
    )
