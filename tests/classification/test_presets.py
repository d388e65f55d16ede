"""The paper's presets against a table of the authors' settings for ResNet-18 on CIFAR-10, written down apart."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.presets import PRESETS
from erase_concept.classification.recipe import unlearn_recipe
from erase_concept.errors import RequestError

_SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 256, "batch_norm": "update"}
TEN: dict[str, dict[str, Any]] = {
    "retrain": {**_SGD, "epochs": 182, "lr": 0.1, "milestones": (91, 136), "cosine": False},
    "fine-tune": {**_SGD, "epochs": 10, "lr": 0.01, "milestones": ()},
    "l1-sparse": {**_SGD, "epochs": 10, "lr": 0.01, "alpha": 1e-4},
    "random-label": {**_SGD, "epochs": 10, "lr": 1e-3, "order": "forget-first"},
    "gradient-ascent": {**_SGD, "epochs": 5, "lr": 1e-4},
    "influence": {"alpha": 10.0, "samples": 1002, "damping": 1000.0},
    "boundary-expand": {**_SGD, "epochs": 10, "lr": 1e-6},
    "boundary-shrink": {**_SGD, "epochs": 10, "lr": 1e-6, "bound": 0.1},
    "salun": {**_SGD, "epochs": 10, "lr": 0.013, "order": "forget-first"},
    "salun-soft": {**_SGD, "epochs": 10, "lr": 5e-4, "ratio": 0.1},
    "scrub": {
        **{"epochs": 3, "lr": 5e-4, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128, "forget_batch_size": 32},
        **{"forget_epochs": 2, "gamma": 0.99, "alpha": 0.001, "temperature": 4.0, "milestones": (3, 5, 9)},
    },
    "ssd": {"alpha": 10.0, "dampening": 1.0, "batch_size": 128},
    "bad-teacher": {
        "epochs": 1,
        "lr": 1e-4,
        "optimizer": "adam",
        "batch_size": 256,
        "retained": 0.3,
        "temperature": 1.0,
    },
}
# What differs for half of the images, and for a class.
HALF: dict[str, dict[str, Any]] = {
    "random-label": {"lr": 0.01},
    "boundary-expand": {"lr": 5e-6},
    "boundary-shrink": {"lr": 5e-6},
    "salun": {"lr": 0.05},
    "salun-soft": {"lr": 0.013, "ratio": 0.9},
}
CLASS: dict[str, dict[str, Any]] = {"influence": {"alpha": 2.0}}
CASES = {"random:10%": {}, "random:50%": HALF, "class:airplane": CLASS}


@pytest.mark.parametrize("name", UNLEARNERS.all())
@pytest.mark.parametrize("forget", CASES)
def test_the_papers_settings(name: str, forget: str) -> None:
    recipe = unlearn_recipe("model", "cifar10:data", forget, method=name, preset="paper")
    expected = TEN[name] | CASES[forget].get(name, {})
    assert {key: getattr(recipe.settings, key) for key in expected} == expected
    assert (recipe.data.validation, recipe.data.crop, recipe.data.train) == (0.1, 4, None)
    assert recipe.mask.kind == ("salient" if name == "salun" else "none")
    if name == "salun":
        assert recipe.mask.sparsity == (0.8 if forget == "random:50%" else 0.5)
        assert (recipe.mask.batch_size, recipe.mask.accumulate) == (256, "signed")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", UNLEARNERS.all())
def test_every_preset_has_valid_settings_for_every_method(name: str, preset: str) -> None:
    recipe = unlearn_recipe("model", "fashion-mnist", "random:50%", method=name, preset=preset, settings={})
    assert {field.name for field in fields(recipe.settings)} >= {UNLEARNERS.find(name).tuned_setting}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(RequestError, match="allowed: default, paper, small"):
        unlearn_recipe("model", "fashion-mnist", "random:50%", preset="best")
