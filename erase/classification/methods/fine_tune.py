"""Fine-tuning (FT): training goes on with the retained images, as a baseline (Warnecke et al., arXiv 2108.11577)."""

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


@unlearner(
    "fine-tune",
    ClassifierTraining,
    summary="Goes on training with the retained images, so that what is not rehearsed may fade.",
    title="Fine-tuning (FT)",
    paper="arXiv 2108.11577",
)
def fine_tune(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: ClassifierTraining,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  E_retain CE(theta; x, y)  from the classifier's weights. The images to forget are never seen."""

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        return cross_entropy(model.logits(batch.images), batch.labels)

    schedule = Schedule(settings.epochs, lambda _: [Part("retain", data.retain, settings.batch_size)], seed)
    yield from train_epochs(model, data, loss, schedule, mask, settings, checkpoint=checkpoint)
