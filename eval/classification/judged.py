"""What a classifier says of labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from erase_concept.errors import EraseError
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.pipelines.classifiers.images import Images

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH = 500


@dataclass(frozen=True, eq=False)
class Judged:
    """What a classifier says of n images.

    ``confidence`` is the probability p of each one's true class, ``scaled`` is log(p / (1 - p)), and ``right`` tells
    whether p is the largest.
    """

    confidence: NDArray[np.float64]
    scaled: NDArray[np.float64]
    right: NDArray[np.bool_]

    @property
    def loss(self) -> NDArray[np.float64]:
        """The cross-entropy of each image."""
        loss: NDArray[np.float64] = -np.log(np.maximum(self.confidence, 1e-30))
        return loss


@torch.no_grad()
def judged(model: Classifier, images: Images, labels: Tensor, rows: Tensor) -> Judged:
    """Return what a classifier says of images; raises EraseError where its outputs are not finite."""
    confidence, scaled, right = [], [], []
    for some in rows.split(_BATCH):
        logits = model.logits(images[some].to(model.device).float() / 255).double().cpu()
        if not bool(logits.isfinite().all()):
            raise EraseError(f"{model.source} returned values that are no numbers")
        own, places = labels[some], torch.arange(len(some))
        confidence.append(logits.softmax(1)[places, own])
        right.append(logits.argmax(1) == own)
        true = logits[places, own]
        logits[places, own] = -torch.inf
        scaled.append(true - logits.logsumexp(1))  # exact where p is 1 in floating point
    return Judged(*(torch.cat(found).numpy() for found in (confidence, scaled, right)))
