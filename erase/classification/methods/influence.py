"""Influence unlearning (IU) with WoodFisher's inverse (arXiv 2004.14340), as in arXiv 2304.04934 and SalUn's code."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from torch.nn.utils import parameters_to_vector

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.one_step import change_once, mean_gradient
from erase_concept.classification.training import Events
from erase_concept.classification.woodfisher import woodfisher
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings


@settings
class InfluenceSettings:
    """The length of the step, and the images whose gradients make up the Fisher matrix."""

    alpha: Annotated[float, described("Length of the step.", ge=0, source="Scissorhands' code, 10 % of CIFAR-10")] = (
        10.0
    )
    samples: Annotated[
        int, described("Retained images, in the data's order, whose gradients are taken.", ge=2, source="SalUn's code")
    ] = 1002
    damping: Annotated[float, described("N of WoodFisher's recursion.", gt=0, source="SalUn's code")] = 1000.0
    batch_size: Annotated[int, described("Images in a batch of the two mean gradients.", ge=1)] = 256


@unlearner(
    "influence",
    InfluenceSettings,
    summary="Takes one step by the influence of the images to forget: an inverse Fisher matrix times their gradient.",
    title="Influence unlearning (IU)",
    paper="arXiv 2304.04934",
    tuned_setting="alpha",
    gradients=lambda settings, forget, retain: forget + retain + min(settings.samples, retain),
)
def influence(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: InfluenceSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Move the weights by  theta + alpha k,  k = WoodFisher^-1 v,  v = n_f / n (mean forget grad - mean retain grad).

    BatchNorm is in evaluation mode. Images are cropped and mirrored at random, as in the authors' code.
    """
    began, generator = time.perf_counter(), stage_generator(seed, "influence")
    share = len(data.forget) / (len(data.forget) + len(data.retain))
    ours, loss = mean_gradient(model, data, data.forget, settings.batch_size, generator)
    theirs, _ = mean_gradient(model, data, data.retain, settings.batch_size, generator)
    chosen = data.retain.sort().values[: settings.samples]
    singles = (mean_gradient(model, data, row, 1, generator)[0] for row in chosen.split(1))
    k = woodfisher(share * (ours - theirs), singles, settings.damping)
    weights = parameters_to_vector(model.network.parameters()).detach()
    yield change_once(model, mask, weights + settings.alpha * k, loss=loss, size=settings.alpha, began=began)
