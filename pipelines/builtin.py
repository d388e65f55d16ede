"""Built-in models: each is a folder beside this file with a ``builtin.yaml``, which says what goes with the model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from erase_concept.prompts.find import GENERAL


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class BuiltinModel:
    """A model that is installed with the package, and what belongs to it."""

    name: str
    about: str  # one line for ``list models``
    folder: Path  # the diffusers folder
    catalogs: tuple[str, ...]  # the catalogues of the concepts that it knows
    benchmark: str  # the benchmark that it is judged by where none is named
    preset: str  # the preset that "default" stands for
    demo: str  # the concept that the demo erases
    compare: tuple[str, ...]  # the concepts that a comparison erases where none are named
    images: str | None = None  # the module whose ``read`` gives labelled images of what it draws, for classifiers


@cache
def builtin_models() -> dict[str, BuiltinModel]:
    """Return the built-in models by name; raises ValueError when a ``builtin.yaml`` lacks a value or has another."""
    found: dict[str, BuiltinModel] = {}
    for file in sorted(Path(__file__).parent.glob("*/builtin.yaml")):
        model: Any = TypeAdapter(BuiltinModel).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
        found[model.name] = replace(model, folder=file.parent / model.folder)
    return found


def catalogs_of(model: str | Path) -> tuple[str, ...]:
    """Return the names of the catalogues in which a model's concepts are looked up."""
    builtin = builtin_models().get(str(model))
    return builtin.catalogs if builtin else GENERAL
