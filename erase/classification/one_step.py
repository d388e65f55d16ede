"""Methods that change a classifier once: gradients of many images, and the change within a mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import vector_to_parameters

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.errors import EraseError
from erase_concept.masks.mask import Mask
from erase_concept.masks.saliency import accumulate
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.training.gradients import salient_gradient
from erase_concept.training.loop import Record


def mean_gradient(
    model: Classifier, data: ForgetRetainImages, rows: Tensor, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Return the gradient of the mean cross-entropy of images int64 [n], as one vector, and that loss.

    The network is in evaluation mode, and images are cropped and mirrored at random.
    """
    total, loss = torch.zeros(sum(p.numel() for p in model.network.parameters()), device=model.device), 0.0
    for p in model.network.parameters():
        p.requires_grad_(True)
    try:
        for some in rows.split(batch_size):
            images, labels = (one.to(model.device) for one in data.batch(some, generator))
            value = cross_entropy(model.logits(images), labels, reduction="sum") / len(rows)
            found = salient_gradient(value, model.network, None)
            total += torch.cat([g.flatten() for g in found.values()])
            loss += float(value.detach())
    finally:
        for p in model.network.parameters():
            p.requires_grad_(False)
    return total, loss


def importance(
    model: Classifier, data: ForgetRetainImages, rows: Tensor, batch_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the mean over batches of the squared gradient of the mean cross-entropy, by parameter."""
    batches = rows[torch.randperm(len(rows), generator=generator)].split(batch_size)

    def learnt(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model.logits(images), labels)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for some in batches:
            images, labels = (one.to(model.device) for one in data.batch(some, generator))
            yield partial(learnt, images, labels)

    return {name: total / len(batches) for name, total in accumulate(model.network, losses(), "squared").items()}


@torch.no_grad()
def change_once(
    model: Classifier, mask: Mask | None, weights: Tensor, *, loss: float, size: float, began: float
) -> Record:
    """Give the weights that a mask allows new values, all as one vector, in place, and return the record of the step.

    ``loss`` is that before the step, ``size`` the setting that tells how large it is. Raises EraseError where a new
    value is not finite.
    """
    if not bool(weights.isfinite().all()):
        raise EraseError(f"the weights are not finite after the step of size {size}: make it smaller")
    parameters = dict(model.network.named_parameters())
    if mask is not None:
        allowed = torch.cat([mask.dense(name).flatten() for name in parameters]).to(weights.device)
        weights = torch.where(allowed, weights, torch.cat([p.flatten() for p in parameters.values()]))
    vector_to_parameters(weights, parameters.values())
    return Record(1, 1, loss, {"forget": loss}, size, time.perf_counter() - began)
