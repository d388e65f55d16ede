"""Measure an unlearned classifier: UA, RA, TA and MIA, and with a retrained one of the same images their gaps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from erase_concept.classification.data import Split, split_data
from erase_concept.classification.forget import forget_rows
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.run import UnlearnRun
from erase_concept.errors import RequestError
from erase_concept.eval.classification.gap import average_gap
from erase_concept.eval.classification.judged import judged
from erase_concept.eval.classification.membership import loss_threshold, svc_confidence
from erase_concept.eval.classification.shadow import ask_shadow_models
from erase_concept.eval.metrics.accuracy import share
from erase_concept.eval.score import Score
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.pipelines.classifiers.load import Module

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ClassifierReport:
    """What was measured of one unlearned classifier.

    ``images`` are the numbers of forgotten and retained ones. ``scores`` are shares from 0 to 1; where there is a
    retrained classifier its own are their baselines, and ``gap`` is the mean of the differences' sizes. ``seconds`` are
    those of mask and unlearning; of a run that was resumed they are not all.
    """

    method: str
    forget: str
    data: str
    images: dict[str, int]
    seed: int
    scores: tuple[Score, ...]
    seconds: float
    resumed: bool
    gap: float | None = None

    @property
    def values(self) -> dict[str, float]:
        """The scores' values by metric."""
        return {score.metric: score.value for score in self.scores}


def evaluate_classifier(
    run: str | Path | UnlearnRun,
    *,
    retrain: str | Path | UnlearnRun | None = None,
    shadow_models: int | None = None,
    module: Module | None = None,
) -> ClassifierReport:
    """Measure a run, and its distance from a run of Retrain that forgot the same images.

    With ``shadow_models``, four or more, there is LiRA too, a membership attack by so many networks, which are trained
    as Retrain was and kept in its folder. ``module`` is one like that of the runs, where these are of a module that was
    given in Python, or a function that returns one with new weights, as LiRA needs it.

    Raises RequestError for a folder without such a run and for a retrained classifier of other images.
    """
    if retrain is None and shadow_models is not None:
        raise RequestError("shadow_models", shadow_models, "needs retrain: shadow models are trained as it was")
    ours = run if isinstance(run, UnlearnRun) else UnlearnRun(Path(run))
    split = split_data(ours.recipe.data)
    if not ours.run_info["images"]["forget"]:
        raise RequestError("run", ours.path, "has forgotten nothing: it is an original")
    forgotten = _forgotten(ours, split)
    model, target = ours.classifier(split, module), ours.recipe.forget
    scores, gap = measure(model, split, forgotten, target), None
    if retrain is not None:
        theirs = retrain if isinstance(retrain, UnlearnRun) else UnlearnRun(Path(retrain))
        if not UNLEARNERS.find(theirs.recipe.method).anew:
            raise RequestError("retrain", theirs.path, f"is a run of {theirs.recipe.method}, not of retrain")
        if theirs.recipe.data != ours.recipe.data or not torch.equal(_forgotten(theirs, split), forgotten):
            raise RequestError("retrain", theirs.path, "has other images, or has forgotten others")
        base_model = theirs.classifier(split, module)
        measured = measure(base_model, split, forgotten, target)
        if shadow_models is not None:
            asked = ask_shadow_models(theirs, split, forgotten, shadow_models, module)
            scores, measured = (
                [*found, asked.attack(one, split, target)] for found, one in ((scores, model), (measured, base_model))
            )
        base = {score.metric: score for score in measured}
        scores = [_with_baseline(score, base[score.metric]) for score in scores]
        gap = average_gap({s.metric: s.value for s in scores}, {s.metric: s.value for s in base.values()})
    info = ours.run_info
    seconds, resumed = sum(info["seconds"].values()), bool(info["resumed_at_step"])
    return ClassifierReport(
        info["method"],
        info["forget"],
        split.images.name,
        info["images"],
        info["seed"],
        tuple(scores),
        seconds,
        resumed,
        gap,
    )


def _forgotten(run: UnlearnRun, split: Split) -> Tensor:
    """Return the numbers of the images that a run forgot; raises RequestError where they are not the split's."""
    return forget_rows(f"indices:{run.path / 'forget.txt'}", split, 0)


def measure(model: Classifier, split: Split, forgotten: Tensor, target: str) -> list[Score]:
    """Return UA, RA, TA, MIA by confidence and MIA by loss, in evaluation mode and of images as they are.

    Where a class is forgotten, TA is that of the other classes. For both attacks the members are the first retained
    images in the data's order, as many as there are test images, as in SalUn's code.
    """
    images = split.images
    retained = split.train[~torch.isin(split.train, forgotten)]
    tested = split.test
    if target.startswith("class:"):
        tested = tested[images.test_labels[tested] != images.labels.index(target.removeprefix("class:"))]
    forget, retain = (judged(model, images.train, images.train_labels, rows) for rows in (forgotten, retained))
    test = judged(model, images.test, images.test_labels, tested)
    first = slice(len(tested))  # of the retained images, which are in the data's order
    confidence = svc_confidence(retain.confidence[first], test.confidence, forget.confidence)
    loss = loss_threshold(retain.loss[first], test.loss, forget.loss)

    def score(metric: str, hits: NDArray[np.bool_], protocol: str) -> Score:
        return share(metric, target, hits.tolist(), protocol)

    members = f"members are {len(retain.loss[first])} retained images, non-members {len(tested)} test images"
    return [
        score("ua", ~forget.right, "forgotten images that are classified wrongly"),
        score("ra", retain.right, "retained images that are classified rightly"),
        score(
            "ta", test.right, "test images that are classified rightly" + ", of other classes" * ("class:" in target)
        ),
        score(
            "mia",
            confidence,
            f"forgotten images that a support vector machine on confidence calls non-members; {members}",
        ),
        score("mia_loss", loss, f"forgotten images that a threshold of the loss calls non-members; {members}"),
    ]


def _with_baseline(score: Score, base: Score) -> Score:
    return replace(score, baseline=base.value, baseline_ci95=base.ci95)
