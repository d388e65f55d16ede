"""Boundary expanding (BE, Chen et al., CVPR 2023, arXiv 2303.11570)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.extra_class import with_extra_class, without_extra_class
from erase_concept.classification.method import unlearner
from erase_concept.classification.training import Batch, ClassifierTraining, Events, Part, Schedule, train_epochs
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.seed import stage_seed
from erase_concept.settings import settings


@settings
class BoundarySettings(ClassifierTraining):
    """The settings of the training, with the learning rate of Scissorhands' baselines."""

    lr: float = 1e-6


@unlearner(
    "boundary-expand",
    BoundarySettings,
    summary="Trains the images to forget to be of an extra class, which is dropped afterwards.",
    title="Boundary expanding (BE)",
    paper="arXiv 2303.11570",
    linear_head=True,
)
def boundary_expand(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: BoundarySettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  E_forget CE(theta; x, K + 1)  with a logit K + 1 of random weights, which may change under any mask.

    The logit is dropped afterwards. The authors' code keeps it, where it counts as a wrong class.
    """
    expanded, wider = with_extra_class(model, mask, stage_seed(seed, "extra class"))

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        return cross_entropy(model.logits(batch.images), torch.full_like(batch.labels, len(model.labels) - 1))

    schedule = Schedule(settings.epochs, lambda _: [Part("forget", data.forget, settings.batch_size)], seed)
    yield from train_epochs(expanded, data, loss, schedule, wider, settings, checkpoint=checkpoint)
    model.network.load_state_dict(without_extra_class(expanded))
