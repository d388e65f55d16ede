"""Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

_CODE = "the authors' code"


@settings
class ConceptAblationSettings(Training):
    """Concept Ablation's settings, those of its styles and objects."""

    steps: Annotated[int, described(source=_CODE)] = 100
    lr: Annotated[float, described(source="the authors' code: 2e-6 for each row of the batch")] = 1.6e-5
    optimizer: Annotated[Literal["adam", "adamw"], described(source=_CODE)] = "adamw"
    weight_decay: Annotated[float, described(source=_CODE)] = 0.01
    alpha: Annotated[
        float, described("Weight of the loss on pictures of the anchor; the paper's lambda.", ge=0, source=_CODE)
    ] = 1.0


@method(
    "concept-ablation",
    ConceptAblationSettings,
    summary="Gives the concept's prompts the anchor's own prediction, on pictures of the anchor.",
    title="Concept Ablation",
    paper="arXiv 2303.13516",
    trains="cross-attention",
    latents=("anchor",),
    scope="cross-attention",
    text_encoder=True,
)
def concept_ablation(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ConceptAblationSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Fit the prediction for the concept's prompts to that for the anchor's, on pictures of the anchor.

    Minimises  E |e(x_t, c) - sg e(x_t, c')|^2 + lambda E |e(x'_t, c') - noise|^2,  with the concept's prompt c, the
    same prompt for the anchor c', noisy latents x_t and x'_t of the anchor, and no gradient through sg. This is the
    paper's model-based variant. The target is the current model's; where only cross-attention is trained, it stays
    near the base model's. The authors' code trains the keys and values of cross-attention; this scope has its queries
    and outputs too. With the scope "text-encoder" it is the paper's embedding variant: only the token embeddings of
    the name's own tokens are trained, at a learning rate of their own.
    """
    yield from _ablate(model, data, mask, settings, seed, checkpoint, noise_based=False)


@method(
    "concept-ablation-noise",
    ConceptAblationSettings,
    summary="Trains the concept's prompts on pictures of the anchor, as if they showed the concept.",
    title="Concept Ablation, noise-based",
    paper="arXiv 2303.13516",
    trains="cross-attention",
    latents=("anchor",),
    scope="cross-attention",
    text_encoder=True,
    memory=lambda settings: (Phase(trained=2 * settings.batch_size),),
)
def concept_ablation_noise(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ConceptAblationSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Train the concept's prompt on pictures of the anchor, as if they showed the concept.

    Minimises  E |e(x_t, c) - noise|^2 + lambda E |e(x'_t, c') - noise'|^2,  with the symbols of ``concept_ablation``.
    This is the paper's noise-based variant.
    """
    yield from _ablate(model, data, mask, settings, seed, checkpoint, noise_based=True)


def _ablate(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ConceptAblationSettings,
    seed: int,
    checkpoint: Path | None,
    *,
    noise_based: bool,
) -> Iterator[Record | TargetProgress]:
    count = len(data.anchor_latents)
    if not count:
        raise RequestError("data.anchor", count, "must be at least 1: the method learns from pictures of the anchor")

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = []
        for _ in range(2):
            rows = data.draw_forget(settings.batch_size, generator, "anchor")
            drawn.append((data.forget_ids[data.prompts_of_rows[rows]], data.forget_batch(model, rows, generator)))
        (ids, first), (_, second) = drawn
        embedded = mask is not None and mask.part == "text_encoder"
        concept = model.encode_ids([ids.to(model.device)]) if embedded else first.embeddings
        with torch.no_grad():
            if noise_based:
                target = model.target(first.latents, first.noise, first.timesteps)
            else:
                target = model.predict(first.noisy, first.timesteps, first.remapped)
        predicted = model.predict(
            torch.cat([first.noisy, second.noisy]),
            torch.cat([first.timesteps, second.timesteps]),
            torch.cat([concept, second.remapped]),
        )
        forget = mse_loss(predicted[: len(target)], target)
        anchor = mse_loss(predicted[len(target) :], model.target(second.latents, second.noise, second.timesteps))
        return forget + settings.alpha * anchor, {"forget": forget, "anchor": anchor}

    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)
