"""Random label (RL, Golatkar et al., arXiv 1911.04933): SalUn's loss on all weights (arXiv 2310.12508)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

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
class RandomLabelSettings(ClassifierTraining):
    """The settings of the training, and the order of an epoch."""

    order: Annotated[
        Literal["forget-first", "mixed"],
        described("Go through all images to forget, then all others; or mix them.", source="SalUn's code, CIFAR-10"),
    ] = "forget-first"


@unlearner(
    "random-label",
    RandomLabelSettings,
    summary="Trains the images to forget with random labels and all others with their own: SalUn without its mask.",
    title="Random label (RL)",
    paper="arXiv 1911.04933",
)
def random_label(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: RandomLabelSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  E_forget CE(theta; x, y') + E_retain CE(theta; x, y),  batch by batch; with a mask this is SalUn.

    y' is uniform over all classes, the true one included, and drawn anew in every epoch, as in the authors' code.
    """
    schedule = Schedule(settings.epochs, lambda _: epoch_parts(data, settings), seed)
    yield from train_epochs(model, data, random_label_loss, schedule, mask, settings, checkpoint=checkpoint)


def epoch_parts(data: ForgetRetainImages, settings: RandomLabelSettings) -> Sequence[Part]:
    """Return the parts of an epoch."""
    if settings.order == "mixed":
        return [Part("mixed", torch.cat([data.forget, data.retain]), settings.batch_size)]
    return [Part("forget", data.forget, settings.batch_size), Part("retain", data.retain, settings.batch_size)]


def random_label_loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy, with random labels of the images to forget."""
    drawn = torch.randint(0, len(model.labels), batch.labels.shape, generator=generator).to(batch.labels.device)
    return cross_entropy(model.logits(batch.images), torch.where(batch.forgotten, drawn, batch.labels))
