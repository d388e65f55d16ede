"""What unlearning would do and take: nothing is written, and a few steps are taken on a copy of the classifier."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from erase_concept import masks
from erase_concept.cards import CardAtHand, find_card
from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.mask import given_mask, saliency
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.recipe import UnlearnRecipe
from erase_concept.classification.run import prepare
from erase_concept.counting import LivingBytes
from erase_concept.dry_run import Expected, Stage
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.pipelines.classifiers.load import InPython
from erase_concept.seed import stage_seed
from erase_concept.training.loop import Record

_TIMED = 3  # steps, after the first one


@dataclass(frozen=True)
class UnlearnPlan:
    """What a run would do: images to forget and to retain, weights in all and those that may change, and its stages."""

    forget: int
    retain: int
    weights: int
    may_change: int
    expected: Expected

    def counts(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {
            "images": {"forget": self.forget, "retain": self.retain},
            "weights": {"all": self.weights, "may_change": self.may_change},
        }


@dataclass(frozen=True)
class _Taken:
    """What a call took: bytes of tensors beside the classifier's weights at its peak, operations, seconds."""

    bytes: int
    operations: int
    seconds: float


def plan_unlearn(recipe: UnlearnRecipe, card: str | None = None, *, classifier: InPython | None = None) -> UnlearnPlan:
    """Return what a recipe's run is expected to do and take, on a card of that name or on the device at hand.

    Memory and operations are those of a first step, times those of the next few. Raises RequestError as
    ``iter_unlearn`` does, and for an unknown card.
    """
    found = find_card(card)
    model, data = prepare(recipe, classifier)
    ranked = recipe.mask.kind in ("salient", "least-salient")
    model = replace(model, network=copy.deepcopy(model.network))
    mask = _mask_of_that_size(recipe, model)
    weights = sum(p.numel() for p in model.network.parameters())
    stages: list[Stage] = []
    if ranked:
        taken, batches = _gradients(model, data, len(data.forget), recipe.mask.batch_size)
        stages.append(_stage("mask", batches, f"batches of {recipe.mask.batch_size}", model, taken))
    record = UNLEARNERS.find(recipe.method)
    if record.gradients is None:
        steps, taken = _first_steps(recipe, model, data, mask)
        stages.append(_stage("unlearn", steps, "steps", model, taken))
    else:
        seen = record.gradients(recipe.settings, len(data.forget), len(data.retain))
        size = recipe.settings.batch_size
        taken, batches = _gradients(model, data, seen, size)
        stages.append(_stage("unlearn", batches, f"batches of {size} for one change", model, taken))
    if isinstance(found, CardAtHand):
        found = replace(found, measured=taken.operations / taken.seconds)
    stages = [replace(one, bytes={**one.bytes, "process": found.process}) for one in stages]
    allowed = weights if mask is None else mask.count
    return UnlearnPlan(len(data.forget), len(data.retain), weights, allowed, Expected(found, tuple(stages), ""))


def _stage(name: str, times: int, what: str, model: Classifier, taken: _Taken) -> Stage:
    held = {"weights": sum(p.nbytes for p in model.network.parameters()), "gradients and activations": taken.bytes}
    return Stage(name, times, what, held, times * taken.operations, "fp32")


def _mask_of_that_size(recipe: UnlearnRecipe, model: Classifier) -> Mask | None:
    """Return a mask with as many weights as the run's own: which they are makes no difference to what it takes."""
    if recipe.mask.kind == "none":
        return None
    return given_mask(recipe.mask) or masks.random(model.network, 1 - recipe.mask.sparsity, seed=0)


def _gradients(model: Classifier, data: ForgetRetainImages, images: int, batch_size: int) -> tuple[_Taken, int]:
    """Take the gradient of one batch, and return what that took and how many batches so many images are."""
    few = replace(data, forget=data.forget[:batch_size])
    with LivingBytes(model.network) as living:
        saliency(model, few, batch_size, "signed", 0)
    began = time.perf_counter()
    saliency(model, few, batch_size, "signed", 0)
    return _Taken(living.peak, living.operations, time.perf_counter() - began), math.ceil(images / batch_size)


def _first_steps(
    recipe: UnlearnRecipe, model: Classifier, data: ForgetRetainImages, mask: Mask | None
) -> tuple[int, _Taken]:
    """Take the first steps of a method, and return how many there are in all and what one takes."""
    run = UNLEARNERS.find(recipe.method).run
    events = run(model, data, mask, recipe.settings, seed=stage_seed(recipe.seed, "method"))
    records = (event for event in events if isinstance(event, Record))
    with LivingBytes(model.network) as living:
        first = next(records)
    began = time.perf_counter()
    further = sum(1 for _ in islice(records, _TIMED))
    seconds = (time.perf_counter() - began) / further if further else first.seconds
    return first.steps, _Taken(living.peak, living.operations, seconds)
