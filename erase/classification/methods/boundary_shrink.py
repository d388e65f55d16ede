"""Boundary shrinking (BS, Chen et al., CVPR 2023, arXiv 2303.11570)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.training import Batch, ClassifierTraining, Events, Part, Schedule, train_epochs
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.settings import described, settings


@settings
class BoundaryShrinkSettings(ClassifierTraining):
    """The settings of the training, and the length of the attack's step."""

    lr: float = 1e-6
    bound: Annotated[float, described("Step of the attack in each pixel, of 1.", gt=0, source="SalUn's code")] = 0.1


@unlearner(
    "boundary-shrink",
    BoundaryShrinkSettings,
    summary="Trains the images to forget with the class that lies nearest to them across the boundary.",
    title="Boundary shrinking (BS)",
    paper="arXiv 2303.11570",
)
def boundary_shrink(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: BoundaryShrinkSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  E_forget CE(theta; x, y'),  y' = argmax of the original at an attacked x; it may be the true class."""
    original = model.with_components(network=copy.deepcopy(model.network).eval())

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        nearest = nearest_classes(original, batch.images, batch.labels, settings.bound)
        return cross_entropy(model.logits(batch.images), nearest)

    schedule = Schedule(settings.epochs, lambda _: [Part("forget", data.forget, settings.batch_size)], seed)
    yield from train_epochs(model, data, loss, schedule, mask, settings, checkpoint=checkpoint)


def nearest_classes(original: Classifier, images: Tensor, labels: Tensor, bound: float) -> Tensor:
    """Return the classes int64 [n] of images after one step of FGSM (arXiv 1412.6572).

    x' = x + bound sign(d CE(x, y) / dx), within [0, 1] and rounded to 1/255.
    """
    with torch.enable_grad():
        moved = images.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(original.logits(moved), labels), moved)
    attacked = ((images + bound * gradient.sign()).clamp(0, 1) * 255).round() / 255
    with torch.no_grad():
        return original.logits(attacked).argmax(1)
