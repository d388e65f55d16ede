"""SCRUB (Kurmanji et al., NeurIPS 2023, arXiv 2302.09880): a student that disobeys its teacher on what is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.training import Batch, ClassifierTraining, Events, Part, Schedule, train_epochs
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.settings import described, settings

_CODE = "the authors' notebook, large scale"


@settings
class ScrubSettings(ClassifierTraining):
    """The settings of the authors' notebook for an all-CNN on CIFAR."""

    epochs: int = 3
    batch_size: int = 128
    lr: float = 5e-4
    milestones: tuple[int, ...] = (3, 5, 9)
    forget_batch_size: Annotated[int, described("Images to forget in a step.", ge=1, source=_CODE)] = 32
    forget_epochs: Annotated[int, described("Epochs that begin with the images to forget.", ge=1, source=_CODE)] = 2
    gamma: Annotated[float, described("Weight of the cross-entropy.", ge=0, source=_CODE)] = 0.99
    alpha: Annotated[float, described("Weight of the teacher on retained images.", ge=0, source=_CODE)] = 0.001
    temperature: Annotated[float, described("Temperature of the divergence.", gt=0, source=_CODE)] = 4.0


@unlearner(
    "scrub",
    ScrubSettings,
    summary="Drives a student from its teacher on the images to forget, then towards it on all others.",
    title="SCRUB",
    paper="arXiv 2302.09880",
)
def scrub(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: ScrubSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Maximise  KL(teacher, student)  on forget, then minimise  gamma CE + alpha KL(teacher, student)  on retain.

    Teacher and student are of temperature T, and the divergence is times T^2. The teacher is the original.
    """
    teacher = model.with_components(network=copy.deepcopy(model.network).eval())

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        student, t = model.logits(batch.images), settings.temperature
        with torch.no_grad():
            taught = (teacher.logits(batch.images) / t).softmax(1)
        divergence = kl_div((student / t).log_softmax(1), taught, reduction="batchmean") * t**2
        if batch.part == "forget":
            return -divergence
        return settings.gamma * cross_entropy(student, batch.labels) + settings.alpha * divergence

    def parts(epoch: int) -> Sequence[Part]:
        forget = [Part("forget", data.forget, settings.forget_batch_size)] if epoch < settings.forget_epochs else []
        return [*forget, Part("retain", data.retain, settings.batch_size)]

    yield from train_epochs(
        model, data, loss, Schedule(settings.epochs, parts, seed), mask, settings, checkpoint=checkpoint
    )
