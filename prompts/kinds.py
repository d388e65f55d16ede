"""The defaults of each kind of concept, read from ``kinds.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from erase_concept.prompts.concept import whole_words
from erase_concept.prompts.promptset import read_prompts

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KindDefaults:
    """What a concept of this kind has where its description does not say. Fields are named as in ``Concept``.

    ``prompt_set`` is the name of a CSV file in this folder; its prompts are retained too.
    """

    templates: tuple[str, ...]
    anchor: str = ""
    retain: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    prompt_set: str = ""

    def retained_prompts(self, names: Sequence[str], *more: str) -> tuple[str, ...]:
        """Return ``others``, ``more``, and the prompts of the prompt set that contain none of the names."""
        found: list[str] = [*self.others, *more]
        if self.prompt_set:
            words = whole_words(names)
            rows = read_prompts(_FOLDER / f"{self.prompt_set}.csv").rows
            found += [row.prompt for row in rows if not words.search(row.prompt)]
        return tuple(found)


@cache
def kinds() -> dict[str, KindDefaults]:
    """Return the defaults of each kind by its name."""
    text = (_FOLDER / "kinds.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, KindDefaults]).validate_python(yaml.safe_load(text))


def complete(description: Any) -> Any:
    """Add the defaults of its kind to a concept's description, which wins over them.

    A description with templates, prompts or parts is complete and is returned as it is. So is one of an unknown kind:
    this function does not check descriptions.
    """
    if not isinstance(description, Mapping) or {"templates", "prompts", "combined"} & description.keys():
        return description
    defaults = kinds().get(str(description.get("kind")))
    if defaults is None:
        return description
    synonyms = description.get("synonyms")
    names = [str(description.get("name", "")), *(synonyms if isinstance(synonyms, list) else ())]
    own: dict[str, Any] = {"templates": defaults.templates, "anchor": defaults.anchor, "retain": defaults.retain}
    own["others"] = defaults.retained_prompts(names)
    return {**own, **description}
