"""Gradient ascent (GA, Thudi et al. 2022, arXiv 2109.13398), as the baseline of SalUn (arXiv 2310.12508)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.training import Batch, ClassifierTraining, Events, Part, Schedule, train_epochs
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.settings import settings


@settings
class GradientAscentSettings(ClassifierTraining):
    """The settings of the training, with the authors' epochs and learning rate."""

    epochs: int = 5
    lr: float = 1e-4


@unlearner(
    "gradient-ascent",
    GradientAscentSettings,
    summary="Raises the loss on the images to forget.",
    title="Gradient ascent (GA)",
    paper="arXiv 2109.13398",
)
def gradient_ascent(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: GradientAscentSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  -E_forget CE(theta; x, y).  It has no lower bound, so the learning rate and the epochs decide.

    BatchNorm's statistics are then those of the images to forget alone.
    """

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        return -cross_entropy(model.logits(batch.images), batch.labels)

    schedule = Schedule(settings.epochs, lambda _: [Part("forget", data.forget, settings.batch_size)], seed)
    yield from train_epochs(model, data, loss, schedule, mask, settings, checkpoint=checkpoint)
