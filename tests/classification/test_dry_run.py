"""The plan of a run, held against the run, and recipes in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from erase_concept.classification.dry_run import plan_unlearn
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.recipe import (
    UnlearnRecipe,
    make_unlearn_recipe,
    read_unlearn_recipe,
    unlearn_recipe,
)
from erase_concept.classification.run import iter_unlearn
from erase_concept.errors import RequestError
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.pipelines.classifiers.images import read_images
from erase_concept.pipelines.classifiers.load import new_classifier
from erase_concept.training.loop import Record

ARCHITECTURE = "resnet18-cifar[width=2,stride=2]"


@pytest.fixture
def classifier(fashion: str) -> Classifier:
    return new_classifier(ARCHITECTURE, read_images(fashion), 0)


def recipe_for(fashion: str, method: str, **more: Any) -> UnlearnRecipe:
    """A short run that forgets 20 of 100 images."""
    data = {"source": fashion, "train": 100, "test": 50}
    settings = {"batch_size": 30} | ({} if UNLEARNERS.find(method).gradients else {"epochs": 2})
    return unlearn_recipe(ARCHITECTURE, data, "random:20%", method=method, settings=settings, **more)


@pytest.mark.parametrize("method", ["salun", "scrub", "bad-teacher", "retrain"])
def test_a_plan_has_the_steps_of_the_run(method: str, classifier: Classifier, fashion: str, tmp_path: Path) -> None:
    recipe = recipe_for(fashion, method)
    before = classifier.sha256()
    plan = plan_unlearn(recipe, classifier=classifier)
    assert classifier.sha256() == before
    records = [one for one in iter_unlearn(recipe, tmp_path / "run", classifier=classifier) if isinstance(one, Record)]
    stage = plan.expected.stages[-1]
    assert (stage.name, stage.times) == ("unlearn", records[-1].steps)
    assert (plan.forget, plan.retain) == (20, 80)
    assert plan.may_change == (round(0.5 * plan.weights) if method == "salun" else plan.weights)
    assert stage.bytes["weights"] == 4 * plan.weights
    assert plan.expected.seconds(stage) > 0
    assert [one.name for one in plan.expected.stages] == ["mask", "unlearn"][method != "salun" :]


def test_operations_are_those_of_forward_and_backward(classifier: Classifier, fashion: str) -> None:
    """PyTorch's own counter, on a batch of the same size."""
    from torch.utils.flop_counter import FlopCounterMode

    stage = plan_unlearn(recipe_for(fashion, "fine-tune"), classifier=classifier).expected.stages[-1]
    network = classifier.network.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(30, 1, 8, 8)).sum().backward()
    assert stage.operations == stage.times * counter.get_total_flops()


@pytest.mark.parametrize(("method", "images"), [("ssd", 2 * 20 + 80), ("influence", 20 + 80 + 7)])
def test_a_change_in_one_step_takes_gradients_of_all_images(
    method: str, images: int, classifier: Classifier, fashion: str
) -> None:
    more = {"samples": 7} if method == "influence" else {}
    recipe = recipe_for(fashion, method)
    recipe = make_unlearn_recipe(recipe.to_dict() | {"settings": {"batch_size": 30, **more}})
    stage = plan_unlearn(recipe, classifier=classifier).expected.stages[-1]
    assert (stage.times, stage.what) == (-(-images // 30), "batches of 30 for one change")


def test_what_the_run_refuses_its_plan_refuses(classifier: Classifier, fashion: str) -> None:
    recipe = recipe_for(fashion, "salun")
    bad = make_unlearn_recipe(recipe.to_dict() | {"forget": "random:100%"})
    with pytest.raises(RequestError, match="nothing would be retained"):
        plan_unlearn(bad, classifier=classifier)
    with pytest.raises(RequestError, match="card RTX 1: unknown"):
        plan_unlearn(recipe, "RTX 1", classifier=classifier)


def test_a_recipes_file_is_the_recipe(fashion: str, tmp_path: Path) -> None:
    """What it leaves out of the data is the default, even where a classifier remembers something else."""
    recipe = recipe_for(fashion, "salun", mask={"sparsity": 0.7}, seed=3)
    recipe.save(tmp_path / "recipe.yaml")
    values = read_unlearn_recipe(tmp_path / "recipe.yaml")
    assert make_unlearn_recipe(values) == recipe
    assert values["data"]["crop"] == 4
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"forget": "class:Bag"}), encoding="utf-8")
    assert read_unlearn_recipe(tmp_path / "short.yaml") == {"forget": "class:Bag"}
    for text, words in (("model: x", "a recipe has no such entry"), ("data: x", "must hold a mapping")):
        (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=words):
            read_unlearn_recipe(tmp_path / "bad.yaml")
