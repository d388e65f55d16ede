"""LiRA, a membership attack by shadow models: networks trained as Retrain was, each on a random half of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from erase_concept.classification.data import Split, forget_retain
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.run import UnlearnRun
from erase_concept.errors import RequestError
from erase_concept.eval.classification.judged import judged
from erase_concept.eval.classification.membership import likelihood_ratio, loss_threshold, offline_likelihood
from erase_concept.eval.metrics.accuracy import share
from erase_concept.eval.score import Score
from erase_concept.files import atomic_write
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.pipelines.classifiers.load import Module
from erase_concept.pipelines.classifiers.weights import fill_weights, read_state
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.progress import bar
from erase_concept.seed import stage_generator, stage_seed
from erase_concept.training.loop import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST = 4  # shadow models: two with each image and two without
ONLINE = 8  # from so many on, the models with an image are asked too


@dataclass(frozen=True, eq=False)
class ShadowModels:
    """What shadow models say of images: the forgotten ones, then retained ones, then as many that nothing learnt from.

    ``rows`` are the images' numbers int64 [n], ``values`` the logit-scaled confidences [models, n], and ``member``
    bool [models, n] tells who learnt from which.
    """

    rows: Tensor
    forgotten: int
    retained: int
    values: NDArray[np.float64]
    member: NDArray[np.bool_]

    def attack(self, model: Classifier, split: Split, target: str) -> Score:
        """Return the share of the forgotten images that the attack calls non-members of a classifier.

        The threshold is the one that best tells the retained images from those that nothing learnt from.
        """
        observed = judged(model, split.images.train, split.images.train_labels, self.rows).scaled
        online = len(self.values) >= ONLINE
        score = (likelihood_ratio if online else offline_likelihood)(observed, self.values, self.member)
        forget, retain, other = np.split(-score, [self.forgotten, self.forgotten + self.retained])
        protocol = (
            f"forgotten images that LiRA with {len(self.values)} shadow models"
            f"{'' if online else ', offline,'} calls non-members; members are {len(retain)} retained images, "
            f"non-members {len(other)} validation images"
        )
        return share("mia_lira", target, loss_threshold(retain, other, forget).tolist(), protocol)


def ask_shadow_models(
    retrain: UnlearnRun, split: Split, forgotten: Tensor, count: int, module: Module | None = None
) -> ShadowModels:
    """Train shadow models, and ask them about the images; they are kept in the folder of Retrain.

    Training and validation images are their data, of which each learns a random half; each image is in half of them.
    Raises RequestError for fewer than four models, where there are no validation images, and for a classifier that
    cannot be given new weights.
    """
    target = retrain.recipe.forget
    if count < LEAST:
        raise RequestError("shadow_models", count, f"must be {LEAST} at least: two with each image and two without")
    other = split.validation
    if target.startswith("class:"):
        label = split.images.labels.index(target.removeprefix("class:"))
        other = other[split.images.train_labels[other] != label]
    if not len(other):
        raise RequestError("shadow_models", count, "needs images that nothing learnt from: data.validation is too low")
    model = retrain.classifier(split, module)
    if not model.renewable:
        raise RequestError("shadow_models", count, f"needs new weights, which {model.architecture} cannot be given")
    retained = split.train[~torch.isin(split.train, forgotten)][: len(other)]
    rows = torch.cat([forgotten, retained, other])
    pool = torch.cat([split.train, split.validation]).sort().values
    member = halves(len(pool), count, stage_generator(retrain.recipe.seed, "shadow models"))
    images, labels = split.images.train, split.images.train_labels
    values = [
        judged(one, images, labels, rows).scaled for one in _trained(retrain, model, replace(split, train=pool), member)
    ]
    asked = member[:, torch.searchsorted(pool, rows)]
    return ShadowModels(rows, len(forgotten), len(retained), np.stack(values), asked.numpy())


def halves(images: int, count: int, generator: torch.Generator) -> Tensor:
    """Return which of so many models learns from which image, bool [count, images]: each image is in half of them."""
    return torch.rand(count, images, generator=generator).argsort(0).argsort(0) < count // 2


def _trained(retrain: UnlearnRun, model: Classifier, split: Split, member: Tensor) -> Iterator[Classifier]:
    """Yield the shadow models, each trained where its file is not there yet. All of them are one network."""
    recipe, run = retrain.recipe, UNLEARNERS.find(retrain.recipe.method).run
    folder = retrain.path / "shadow-models" / str(len(member))
    with bar() as shown:
        task = shown.add_task("shadow models", total=len(member))
        for index, chosen in enumerate(member):
            file, checkpoint = folder / f"{index}.safetensors", folder / f"{index}-checkpoint.safetensors"
            if not file.exists():
                folder.mkdir(parents=True, exist_ok=True)
                data = forget_retain(recipe.data, split, split.train[~chosen])
                seed = stage_seed(recipe.seed, "shadow model", index)
                for event in run(model, data, None, recipe.settings, seed=seed, checkpoint=checkpoint):
                    if isinstance(event, Record):
                        shown.update(task, completed=index + event.step / event.steps)
                _keep(model.network, file)
                checkpoint.unlink(missing_ok=True)
            fill_weights(model.network, read_state(file)[0])
            yield model
            shown.update(task, completed=index + 1)


def _keep(network: nn.Module, file: Path) -> None:
    with atomic_write(file) as partial:
        save_tensors({name: value.contiguous() for name, value in network.state_dict().items()}, partial)
