"""Presets: the settings that unlearning in a classifier starts from, by method and by what is forgotten."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from erase_concept.errors import RequestError
from erase_concept.settings import merge

PRESETS = ("default", "paper", "small")
_HALF = 30  # per cent of the images from which on the settings for half of them are taken


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MethodSettings:
    """The parts of a recipe that differ from a method's defaults."""

    settings: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PresetFile:
    """A preset: settings of the data, of any method that has them, of each method, and those that a case changes.

    ``half`` is random forgetting of a large share, ``class_`` that of a class.
    """

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    any: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, MethodSettings] = field(default_factory=dict)
    half: dict[str, MethodSettings] = field(default_factory=dict)
    class_: dict[str, MethodSettings] = Field(default_factory=dict, alias="class")


@dataclass(frozen=True)
class ClassifierPreset:
    """What a recipe starts from: its parts, settings for any method that has them, and where they come from."""

    parts: dict[str, Any]
    any: dict[str, Any]
    source: str = ""


@cache
def _file(name: str) -> PresetFile:
    text = (Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")
    return TypeAdapter(PresetFile).validate_python(yaml.safe_load(text))


def classifier_preset(name: str, method: str, forget: str) -> ClassifierPreset:
    """Return what a recipe starts from, for a method and what is forgotten; raises RequestError for another name.

    "default" are the methods' own defaults, "paper" the authors' settings for ResNet-18 on CIFAR-10, and "small" those
    for a small ResNet-18 on 4,500 images.
    """
    if name not in PRESETS:
        raise RequestError("preset", name, f"allowed: {', '.join(PRESETS)}")
    if name == "default":
        return ClassifierPreset({}, {})
    found = _file(name)
    own, case = found.methods.get(method, MethodSettings()), _case(found, forget).get(method, MethodSettings())
    parts = {
        "data": found.data,
        "settings": merge(own.settings, case.settings),
        "mask": merge(own.mask, case.mask),
    }
    return ClassifierPreset(parts, found.any, found.source)


def _case(found: PresetFile, forget: str) -> dict[str, MethodSettings]:
    if forget.startswith("class:"):
        return found.class_
    share = re.fullmatch(r"random:(\d+(?:\.\d+)?)%", forget)
    return found.half if share and float(share[1]) >= _HALF else {}
