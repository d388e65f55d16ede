"""Gradient ascent (Thudi et al. 2022, arXiv 2109.13398), as the baseline of SalUn (arXiv 2310.12508)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from erase_concept.data import ForgetRetain, draw, training_loss
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train


@settings
class GradientAscentSettings(Training):
    """Gradient ascent's settings beside those of the training."""

    alpha: Annotated[float, described("Weight of the retain loss.", ge=0, source="SalUn's baseline")] = 0.1


def _memory(settings: GradientAscentSettings) -> tuple[Phase, ...]:
    """Hold the gradients of one loss until those of the other are there."""
    return (Phase(trained=2 * settings.batch_size), Phase(trained=settings.batch_size, gradients=1))


@method(
    "gradient-ascent",
    GradientAscentSettings,
    summary="Raises the training loss on the concept and keeps it low on everything else.",
    title="Gradient ascent",
    paper="arXiv 2109.13398",
    memory=_memory,
    bf16_weights=True,
    sharded=True,
)
def gradient_ascent(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: GradientAscentSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Raise the training loss on the concept, and keep it low on everything else.

    Minimises  -E |e(x_f,t, c_f) - noise|^2 + alpha * E |e(x_r,t, c_r) - noise|^2.  The first term has no lower bound,
    so the learning rate and the number of steps decide how far it goes. A loss that is not finite ends the run.
    """

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        forget = data.forget_batch(model, data.draw_forget(settings.batch_size, generator, "forget"), generator)
        retain = data.retain_batch(model, draw(len(data.retain_latents), settings.batch_size, generator), generator)
        forget_loss, retain_loss = training_loss(model, forget), training_loss(model, retain)
        return settings.alpha * retain_loss - forget_loss, {"forget": forget_loss, "retain": retain_loss}

    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)
