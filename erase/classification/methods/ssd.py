"""Selective synaptic dampening (SSD, Foster et al., AAAI 2024, arXiv 2308.07707)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.one_step import change_once, importance
from erase_concept.classification.training import Events
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings

_CODE = "the authors' code, ResNet-18"


@settings
class SSDSettings:
    """Which weights are dampened, and how much."""

    alpha: Annotated[
        float, described("Dampen weights this many times as important to forget as for all.", gt=0, source=_CODE)
    ] = 10.0
    dampening: Annotated[float, described("Lambda: how far they are dampened.", gt=0, source=_CODE)] = 1.0
    batch_size: Annotated[int, described("Images in a batch, of whose mean the gradient is squared.", ge=1)] = 128


@unlearner(
    "ssd",
    SSDSettings,
    summary="Makes weights smaller that are more important for the images to forget than for all: no training.",
    title="Selective synaptic dampening (SSD)",
    paper="arXiv 2308.07707",
    tuned_setting="alpha",
    gradients=lambda settings, forget, retain: 2 * forget + retain,
)
def ssd(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: SSDSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Multiply weights with  I_f > alpha I_D  by  min(1, lambda I_D / I_f).

    I is the mean over batches of the squared gradient of a batch's mean loss, as in the authors' code: over the images
    to forget, and over all training images, those to forget included. BatchNorm is in evaluation mode.
    """
    began = time.perf_counter()
    ours = importance(model, data, data.forget, settings.batch_size, stage_generator(seed, "ssd", "forget"))
    every = torch.cat([data.forget, data.retain])
    of_all = importance(model, data, every, settings.batch_size, stage_generator(seed, "ssd", "all"))
    changed = []
    for name, p in model.network.named_parameters():
        factor = (settings.dampening * of_all[name] / ours[name]).clamp(max=1)
        changed.append(torch.where(ours[name] > settings.alpha * of_all[name], p * factor, p).detach().flatten())
    yield change_once(model, mask, torch.cat(changed), loss=0.0, size=settings.alpha, began=began)
