"""The mask of a classifier: the weights that bear most on its loss on the images to forget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.errors import RequestError
from erase_concept.masks.choose import MASK_KINDS, choose
from erase_concept.masks.mask import Mask
from erase_concept.masks.saliency import Accumulate, accumulate
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.seed import stage_generator, stage_seed
from erase_concept.settings import described, settings

_SALUN = "SalUn, arXiv 2310.12508"


@settings
class ClassifierMask:
    """Which weights may change."""

    kind: Annotated[str, described("salient, none, random, least-salient, or the path of a mask file.")] = "none"
    sparsity: Annotated[float, described("Share of the weights that stay frozen.", ge=0, lt=1, source=_SALUN)] = 0.5
    accumulate: Annotated[
        Literal["signed", "absolute"],
        described("Sum the gradients of batches with their signs, or their sizes.", source=_SALUN),
    ] = "signed"
    batch_size: Annotated[int, described("Forget images in a batch.", ge=1, source=_SALUN)] = 256


def given_mask(settings: ClassifierMask) -> Mask | None:
    """Return the mask of a file, where the settings name one; raises RequestError where it is not usable."""
    if settings.kind in MASK_KINDS:
        return None
    given = Mask.load(Path(settings.kind))
    if given.count == 0:
        raise RequestError("mask.kind", settings.kind, "allows no weight to change")
    return given


def make_mask(settings: ClassifierMask, model: Classifier, data: ForgetRetainImages, seed: int) -> Mask | None:
    """Return the mask over all of the network's weights, ranked together; None where every weight may change."""
    if settings.kind == "none":
        return None
    if settings.kind not in MASK_KINDS:
        return given_mask(settings)
    shapes = {name: tuple(p.shape) for name, p in model.network.named_parameters()}

    def found() -> Iterator[dict[str, Tensor]]:
        yield saliency(model, data, settings.batch_size, settings.accumulate, seed)

    made = choose(settings.kind, settings.sparsity, shapes, found, stage_seed(seed, "mask"))
    about = {"kind": settings.kind, "sparsity": settings.sparsity, "accumulate": settings.accumulate, "seed": seed}
    about |= {"architecture": model.architecture, "base": model.sha256(), "forget": len(data.forget)}
    return Mask(made.bits, made.shapes, {key: str(value) for key, value in about.items()})


def saliency(
    model: Classifier, data: ForgetRetainImages, batch_size: int, how: Accumulate, seed: int
) -> dict[str, Tensor]:
    """Return  |d l / d theta|,  l = - mean of CE over the images to forget, in evaluation mode, of every weight.

    As in the authors' code the images are cropped and mirrored at random. A smaller last batch counts for no more than
    it holds.
    """
    generator = stage_generator(seed, "saliency")

    def forgetting(images: Tensor, labels: Tensor, share: float) -> Tensor:
        return -share * cross_entropy(model.logits(images), labels)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for rows in data.forget[torch.randperm(len(data.forget), generator=generator)].split(batch_size):
            images, labels = data.batch(rows, generator)
            share = len(rows) / len(data.forget)
            yield partial(forgetting, images.to(model.device), labels.to(model.device), share)

    return accumulate(model.network, losses(), how, shared=True)
