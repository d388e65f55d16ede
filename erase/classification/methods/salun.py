"""SalUn, saliency unlearning (Fan, Liu et al., ICLR 2024, arXiv 2310.12508)."""

from __future__ import annotations

from pathlib import Path

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.methods.random_label import RandomLabelSettings, epoch_parts, random_label_loss
from erase_concept.classification.training import Events, Schedule, train_epochs
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.settings import settings


@settings
class SalUnSettings(RandomLabelSettings):
    """Random label's settings, with the learning rate of the authors' README for 10 % of CIFAR-10."""

    lr: float = 0.013


@unlearner(
    "salun",
    SalUnSettings,
    summary="Trains the images to forget with random labels, in the salient weights alone.",
    title="SalUn",
    paper="arXiv 2310.12508",
    mask="salient",
)
def salun(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: SalUnSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise random label's loss over the mask:  theta = m (theta_o + delta) + (1 - m) theta_o."""
    schedule = Schedule(settings.epochs, lambda _: epoch_parts(data, settings), seed)
    yield from train_epochs(model, data, random_label_loss, schedule, mask, settings, checkpoint=checkpoint)
