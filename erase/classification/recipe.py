"""Recipes for classifiers: the validated description of a run, from the command line or a YAML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from erase_concept.classification.data import DataSettings
from erase_concept.classification.mask import ClassifierMask
from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.presets import classifier_preset
from erase_concept.errors import RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.classifiers.load import recorded_data
from erase_concept.recipe import read_recipe
from erase_concept.settings import changed_settings, check_settings, merge

NOTHING = "none"  # what is forgotten when an original is trained


@dataclass(frozen=True)
class UnlearnRecipe:
    """A whole run. ``settings`` are the method's own, of its record's class; ``forget`` says which images it forgets.

    ``classifier`` is a folder, ``ARCHITECTURE=FILE``, or for a method that begins anew an architecture.
    """

    classifier: str
    forget: str
    method: str
    settings: Any
    mask: ClassifierMask
    data: DataSettings
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they stand in YAML: settings that differ from their defaults, and the mask's kind."""
        return {
            "classifier": self.classifier,
            "forget": self.forget,
            "method": self.method,
            "settings": changed_settings(self.settings),
            "mask": {"kind": self.mask.kind} | changed_settings(self.mask),
            "data": changed_settings(self.data),
            "seed": self.seed,
        }

    def fingerprint(self) -> str:
        """Return a SHA-256 over the recipe."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, file: Path) -> None:
        """Write the recipe as YAML."""
        with atomic_write(file) as partial:
            partial.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def make_unlearn_recipe(values: Mapping[str, Any]) -> UnlearnRecipe:
    """Make a recipe of nested plain values, as they stand in YAML; raises RequestError that names the first bad one."""
    _check_names(values)
    for name in ("classifier", "forget"):
        if not values.get(name):
            raise RequestError(name, "(not given)", "needed in a recipe")
    method = UNLEARNERS.find(str(values.get("method", "salun")))
    mask = {"kind": method.mask} | _mapping(values, "mask")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise RequestError("seed", seed, "must be a whole number from 0 on")
    return UnlearnRecipe(
        classifier=str(values["classifier"]),
        forget=str(values["forget"]),
        method=method.name,
        settings=check_settings(method.settings, _mapping(values, "settings"), "settings."),
        mask=check_settings(ClassifierMask, mask, "mask."),
        data=check_settings(DataSettings, _mapping(values, "data"), "data."),
        seed=seed,
    )


def read_unlearn_recipe(file: Path) -> dict[str, Any]:
    """Read the values of a recipe file, such as a run's.

    One that speaks of the data says all of it: what it leaves out is the default, and not what a classifier remembers.
    Raises RequestError when it is no YAML mapping, or has an entry that a recipe does not have.
    """
    values = read_recipe(file)
    _check_names(values)
    if "data" in values:
        values["data"] = DataSettings().recorded() | _mapping(values, "data")
    return values


def _check_names(values: Mapping[str, Any]) -> None:
    known = [one.name for one in fields(UnlearnRecipe)]
    for name in values:
        if name not in known:
            raise RequestError(name, values[name], f"a recipe has no such entry; it has: {', '.join(known)}")


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name, {})
    if not isinstance(part, dict):
        raise RequestError(name, part, "must hold a mapping of settings")
    return part


def unlearn_recipe(
    classifier: str,
    data: str | Mapping[str, Any],
    forget: str,
    *,
    method: str = "salun",
    preset: str = "default",
    **values: Any,
) -> UnlearnRecipe:
    """Return the recipe for forgetting some images: the preset, with the given values laid over it.

    ``data`` is a data set, as ``DataSettings.source``, or several of ``DataSettings``; by default its images are split
    and changed as when the classifier learnt from them. ``forget`` is what ``forget_rows`` takes. ``values`` are a
    recipe's fields; nested mappings such as ``settings={"lr": 0.01}`` change what they name alone.
    """
    record = UNLEARNERS.find(method)
    start = classifier_preset(preset, method, forget)
    known = {one.name for one in fields(record.settings)}
    common = {"settings": {name: value for name, value in start.any.items() if name in known}}
    split = {"data": recorded_data(classifier)}
    named: dict[str, Any] = {"classifier": classifier, "forget": forget, "method": method}
    named["data"] = {"source": data} if isinstance(data, str) else dict(data)
    return make_unlearn_recipe(reduce(merge, (common, start.parts, split, named, values)))
