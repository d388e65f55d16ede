"""Retrain: a new network that never saw the images to forget. Other methods are measured by their distance from it."""

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
from erase_concept.seed import stage_seed
from erase_concept.settings import settings


@settings
class RetrainSettings(ClassifierTraining):
    """The settings of a training from new weights: those with which SalUn's authors train CIFAR-10's ResNet-18."""

    epochs: int = 182
    lr: float = 0.1
    milestones: tuple[int, ...] = (91, 136)


@unlearner(
    "retrain",
    RetrainSettings,
    summary="Trains a new network on the retained images alone: exact unlearning, and the yardstick of all others.",
    title="Retrain",
    paper="arXiv 2310.12508",
    tuned_setting="epochs",
    new_weights=True,
    anew=True,
)
def retrain(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: RetrainSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  E_retain CE(theta; x, y)  from new weights, which the seed gives; with a mask only its weights are new.

    The original of the same seed begins with the same weights, for it is trained by this function with no image to
    forget.
    """

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        return cross_entropy(model.logits(batch.images), batch.labels)

    schedule = Schedule(settings.epochs, lambda _: [Part("retain", data.retain, settings.batch_size)], seed)
    yield from train_epochs(
        model,
        data,
        loss,
        schedule,
        mask,
        settings,
        checkpoint=checkpoint,
        start=lambda model: renew(model, mask, stage_seed(seed, "weights")),
    )


@torch.no_grad()
def renew(model: Classifier, mask: Mask | None, seed: int) -> None:
    """Give the weights that a mask allows, or all with BatchNorm's statistics, the first values of a seed, in place."""
    fresh = model.fresh(seed)
    if mask is None:
        model.network.load_state_dict(fresh.state_dict())
        return
    for name, p in model.network.named_parameters():
        p.copy_(torch.where(mask.dense(name).to(p.device), fresh.get_parameter(name), p))
