"""Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.pipelines.model import Diffusion
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train


@dataclass(frozen=True)
class ConceptAblationSettings(Training):
    """Concept Ablation's settings, those of its styles and objects."""

    steps: int = 100
    lr: float = 1.6e-5  # 2e-6 for each row of the batch
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = 0.01
    alpha: float = 1.0  # lambda, weight of the regularisation

    def __post_init__(self) -> None:
        """Raise ValueError that names the first setting out of its range."""
        super().__post_init__()
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be at least 0, not {self.alpha}")


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
    """Fit the concept's prediction to the anchor's own, on pictures of the anchor.

    Minimises  E |e(x_t, c) - sg e(x_t, c')|^2 + lambda E |e(x'_t, c') - noise|^2,  with the concept's prompt c, the
    same prompt said of the anchor c', noisy latents x_t and x'_t of the anchor, and no gradient through sg: the paper's
    model-based variant. The target is the current model's, which in cross-attention alone stays near the base model's.
    The authors' code trains keys and values of the cross-attention, to which this scope adds queries and outputs. With
    the scope "text-encoder" it is the paper's embedding variant: the embeddings of the name's own tokens, ahead of the
    text encoder's layers, are all that is trained, at a learning rate of their own.
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

    Minimises  E |e(x_t, c) - noise|^2 + lambda E |e(x'_t, c') - noise'|^2,  with the names of ``concept_ablation``: the
    paper's noise-based variant.
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
