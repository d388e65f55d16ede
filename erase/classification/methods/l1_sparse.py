"""l1-sparse: sparsity-aware unlearning (Jia, Liu et al., NeurIPS 2023, arXiv 2304.04934)."""

from __future__ import annotations

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
class L1SparseSettings(ClassifierTraining):
    """The settings of fine-tuning, and the weight of the penalty."""

    alpha: Annotated[
        float,
        described("Weight of the l1 norm in the first epoch; it falls to zero.", ge=0, source="Scissorhands' code"),
    ] = 1e-4


@unlearner(
    "l1-sparse",
    L1SparseSettings,
    summary="Fine-tunes on the retained images under an l1 penalty that falls to zero.",
    title="l1-sparse",
    paper="arXiv 2304.04934",
    tuned_setting="alpha",
)
def l1_sparse(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: L1SparseSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise  E_retain CE(theta; x, y) + alpha (1 - e / E) |theta|_1  in epoch e of E, from 0; nothing is pruned.

    The norm is that of all weights, those of BatchNorm included; a mask freezes some of them as ever.
    """

    def loss(model: Classifier, batch: Batch, generator: torch.Generator) -> Tensor:
        norm = torch.stack([p.abs().sum() for p in model.network.parameters()]).sum()
        weight = settings.alpha * (1 - batch.epoch / settings.epochs)
        return cross_entropy(model.logits(batch.images), batch.labels) + weight * norm

    schedule = Schedule(settings.epochs, lambda _: [Part("retain", data.retain, settings.batch_size)], seed)
    yield from train_epochs(model, data, loss, schedule, mask, settings, checkpoint=checkpoint)
