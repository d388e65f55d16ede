"""Presets: settings by base model and kind of concept, one YAML file for each kind of base model.

A file has an entry for each kind of concept, one for "any" other kind, and under "methods" the settings of every other
method, by name and for "any".
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from erase_concept.errors import RequestError
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.settings import merge

PAPER = "stable-diffusion"  # the preset of the published settings, and of every model without one of its own


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Return the presets' values by name: "paper", and those that are named after a base model."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    found = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    return {"paper": found[PAPER], **found}


def preset(name: str, model: str, kind: str, method: str | None = None) -> dict[str, Any]:
    """Return a preset's values for a model and a kind of concept, as a recipe's fields.

    "default" is what was found best for a built-in model, and the published settings for any other; "paper" is the
    published settings for every model. With another method than the preset's own the values are that method's, as it
    was published: for a built-in model with a budget that all methods share. Raises RequestError for another name.
    """
    if name == "default":
        builtin = builtin_models().get(model)
        name = builtin.preset if builtin else PAPER
    if name not in presets():
        raise RequestError("preset", name, f"allowed: default, {', '.join(presets())}")
    values = presets()[name]
    own: dict[str, Any] = values.get(kind) or values["any"]
    if method in (None, own["method"]):
        return own
    return merge(values["methods"]["any"], values["methods"].get(method, {}))
