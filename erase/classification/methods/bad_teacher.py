"""Bad teacher (Chundawat et al., AAAI 2023, arXiv 2205.08096): a student of two teachers, one of them random."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.training import Batch, ClassifierTraining, Events, Part, Schedule, train_epochs
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.seed import stage_generator, stage_seed
from erase_concept.settings import described, settings

_CODE = "the authors' code"


@settings
class BadTeacherSettings(ClassifierTraining):
    """The settings of the authors' code."""

    epochs: int = 1
    lr: float = 1e-4
    optimizer: Literal["sgd", "adam"] = "adam"
    weight_decay: float = 0.0
    retained: Annotated[float, described("Share of the retained images.", gt=0, le=1, source=_CODE)] = 0.3
    temperature: Annotated[float, described("Temperature of the divergence.", gt=0, source=_CODE)] = 1.0


@unlearner(
    "bad-teacher",
    BadTeacherSettings,
    summary="Teaches what a network of random weights says of the images to forget, and the original of all others.",
    title="Bad teacher",
    paper="arXiv 2205.08096",
    new_weights=True,
)
def bad_teacher(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: BadTeacherSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  KL(teacher, student) / K,  K classes; forget images have a teacher of random weights.

    Both teachers are in evaluation mode. The images are those to forget and a share of the others, mixed.
    """
    good = model.with_components(network=copy.deepcopy(model.network).eval())
    bad = model.with_components(network=model.fresh(stage_seed(seed, "bad teacher")))
    order = torch.randperm(len(data.retain), generator=stage_generator(seed, "bad teacher", "retain"))
    rows = torch.cat([data.forget, data.retain[order[: max(1, round(settings.retained * len(order)))]]])

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        t = settings.temperature
        with torch.no_grad():
            of_good, of_bad = ((one.logits(batch.images) / t).softmax(1) for one in (good, bad))
        taught = torch.where(batch.forgotten[:, None], of_bad, of_good)
        student = (model.logits(batch.images) / t).log_softmax(1)
        return kl_div(student, taught, reduction="batchmean") / len(model.labels)

    schedule = Schedule(settings.epochs, lambda _: [Part("mixed", rows, settings.batch_size)], seed)
    yield from train_epochs(model, data, loss, schedule, mask, settings, checkpoint=checkpoint)
