"""LiRA against a transcription of its formulas, and from shadow models to a score."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, variance
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import erase_concept as ec
from erase_concept.classification.data import split_data
from erase_concept.classification.run import UnlearnRun
from erase_concept.errors import RequestError
from erase_concept.eval.classification.judged import judged
from erase_concept.eval.classification.membership import likelihood_ratio, offline_likelihood
from erase_concept.eval.classification.shadow import halves
from erase_concept.pipelines.classifiers.images import read_images


def made_up(models: int, images: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(models)
    member = halves(images, models, torch.Generator().manual_seed(0)).numpy()
    shadow = generator.normal(generator.normal(0, 2, images), 0.5, (models, images)) + 1.5 * member
    return generator.normal(1, 2, images), shadow, member


def normals(shadow: np.ndarray, which: np.ndarray) -> list[NormalDist]:
    """Transcribed: a normal distribution for each image, of fewer than 64 models with the mean variance of all."""
    columns = zip(shadow.T.tolist(), which.T.tolist(), strict=True)
    values = [[value for value, marked in zip(*column, strict=True) if marked] for column in columns]
    each = [variance(own) for own in values]
    spread = each if len(shadow) >= 64 else [fmean(each)] * len(each)  # they have equally many values
    return [NormalDist(fmean(own), math.sqrt(s)) for own, s in zip(values, spread, strict=True)]


@pytest.mark.parametrize("models", [4, 10, 64])
def test_the_ratio_of_likelihoods_is_the_papers(models: int) -> None:
    observed, shadow, member = made_up(models)
    inside, outside = normals(shadow, member), normals(shadow, ~member)
    ratios = [math.log(a.pdf(x) / b.pdf(x)) for x, a, b in zip(observed, inside, outside, strict=True)]
    assert likelihood_ratio(observed, shadow, member) == pytest.approx(ratios)


@pytest.mark.parametrize("models", [4, 64])
def test_the_offline_score_rises_with_the_papers(models: int) -> None:
    observed, shadow, member = made_up(models)
    outside = normals(shadow, ~member)
    beyond = [math.erfc(b.zscore(x) / math.sqrt(2)) / 2 for x, b in zip(observed, outside, strict=True)]
    assert beyond[0] == pytest.approx(1 - outside[0].cdf(observed[0]))  # to fewer digits where it is small
    assert offline_likelihood(observed, shadow, member) == pytest.approx([-math.log(p) for p in beyond])
    far = offline_likelihood(observed + 1000, shadow, member)
    assert np.isfinite(far).all()  # where the probability itself would be zero


def test_an_image_needs_two_models_of_each_kind() -> None:
    observed, shadow, member = made_up(4)
    with pytest.raises(ValueError, match="two shadow models with it and two without"):
        likelihood_ratio(observed[:2], shadow[:2, :2], member[:2, :2])


@pytest.mark.parametrize("models", [4, 7, 16])
def test_each_image_is_in_half_of_the_models(models: int) -> None:
    member = halves(200, models, torch.Generator().manual_seed(1))
    assert torch.equal(member.sum(0), torch.full((200,), models // 2))
    sizes = member.sum(1) / 200
    assert 0.2 < float(sizes.min()) <= float(sizes.max()) < 0.8


def mlp() -> nn.Module:
    """A network that learns images of noise by heart."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def runs(fashion: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[UnlearnRun, UnlearnRun]:
    """A classifier that learnt 100 images by heart and has hardly forgotten 50 of them, and Retrain."""
    folder, data = tmp_path_factory.mktemp("lira"), {"source": fashion, "train": 100, "validation": 0.5, "test": 50}
    data |= {"crop": 0, "flip": False}
    about: dict[str, Any] = {"size": 8, "mean": (0.4,), "std": (0.2,), "make": mlp}
    given = ec.Classifier.from_module(mlp(), labels=read_images(fashion).labels, **about)
    training = {"epochs": 20, "batch_size": 25, "lr": 0.1, "milestones": ()}
    original = ec.train_classifier(mlp, data=data, out=folder / "original", settings=training)
    learnt = original.classifier(split_data(original.recipe.data), module=mlp)
    asked: dict[str, Any] = {"data": data, "forget": "random:50%"}
    weak = {"epochs": 1, "lr": 1e-4}
    kept = ec.unlearn(learnt, method="fine-tune", out=folder / "kept", settings=weak, **asked)
    return kept, ec.unlearn(given, method="retrain", out=folder / "retrain", settings=training, **asked)


@pytest.mark.parametrize(("models", "words"), [(4, "4 shadow models, offline, calls"), (8, "8 shadow models calls")])
def test_lira_tells_what_was_forgotten(models: int, words: str, runs: tuple[UnlearnRun, UnlearnRun]) -> None:
    pytest.importorskip("sklearn")
    kept, retrain = runs
    report = ec.evaluate_classifier(kept, retrain=retrain, module=mlp, shadow_models=models)
    (score,) = [one for one in report.scores if one.metric == "mia_lira"]
    assert words in score.protocol
    assert score.n == 50
    assert score.baseline is not None
    assert score.value + 0.3 < score.baseline  # one has learnt them, the other has never seen them
    files = sorted((retrain.path / "shadow-models" / str(models)).iterdir())
    assert [file.name for file in files] == sorted(f"{i}.safetensors" for i in range(models))
    times = [file.stat().st_mtime_ns for file in files]
    again = ec.evaluate_classifier(kept, retrain=retrain, module=mlp, shadow_models=models)
    assert again == report
    assert [file.stat().st_mtime_ns for file in files] == times


def test_the_scaled_confidence_is_the_logit_of_the_true_class(runs: tuple[UnlearnRun, UnlearnRun]) -> None:
    kept, _ = runs
    split = split_data(kept.recipe.data)
    found = judged(kept.classifier(split, mlp), split.images.train, split.images.train_labels, split.validation)
    assert found.scaled == pytest.approx(np.log(found.confidence / (1 - found.confidence)), rel=1e-6)


def test_what_lira_needs(runs: tuple[UnlearnRun, UnlearnRun], fashion: str) -> None:
    pytest.importorskip("sklearn")
    kept, retrain = runs
    with pytest.raises(RequestError, match="shadow_models 3: must be 4 at least"):
        ec.evaluate_classifier(kept, retrain=retrain, module=mlp, shadow_models=3)
    with pytest.raises(RequestError, match="shadow_models 8: needs retrain"):
        ec.evaluate_classifier(kept, module=mlp, shadow_models=8)
    with pytest.raises(RequestError, match="is a run of fine-tune, not of retrain"):
        ec.evaluate_classifier(retrain, retrain=kept, module=mlp)
