"""What is known of each kind of concept, read from ``kinds.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from erase_concept.prompts.article import is_proper_name
from erase_concept.prompts.concept import Concept, fill, laid_over, names_within, whole_words
from erase_concept.prompts.promptset import read_prompts

_FOLDER = Path(__file__).parent
# The last word of a technique's or a movement's name, which may begin with a capital as an artist's does.
_TECHNIQUE = re.compile(r"(ism|art|style|painting|drawing|print|printing|etching|mosaic|photography)$", re.IGNORECASE)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KindDefaults:
    """What a concept of this kind has where its description does not say. Fields are named as in ``Concept``.

    ``kind`` is the concept's kind, where it is not the name of these defaults: artists and techniques are styles.
    ``prompt_set`` is the name of a CSV file in this folder; its prompts are retained too. ``evaluate`` are templates to
    evaluate with, which erase nothing.
    """

    templates: tuple[str, ...]
    kind: str = ""
    anchor: str = ""
    anchor_templates: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    prompt_set: str = ""
    evaluate: tuple[str, ...] = ()

    def retained_prompts(self, names: Sequence[str], *more: str) -> tuple[str, ...]:
        """Return ``others``, ``more``, and the prompts of the prompt set, without those that contain a name."""
        found: list[str] = [*self.others, *more]
        if self.prompt_set:
            found += _prompts(self.prompt_set)
        return without_names(found, names)


@cache
def _prompts(name: str) -> tuple[str, ...]:
    return tuple(row.prompt for row in read_prompts(_FOLDER / f"{name}.csv").rows)


def without_names(texts: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the texts that contain none of the names as whole words."""
    words = whole_words(names_within("\n".join(texts), names))
    return tuple(text for text in texts if not words.search(text))


@cache
def kinds() -> dict[str, KindDefaults]:
    """Return the defaults of each kind by its name."""
    text = (_FOLDER / "kinds.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, KindDefaults]).validate_python(yaml.safe_load(text))


def defaults_of(kind: str, name: str) -> KindDefaults | None:
    """Return the defaults for a name of a kind; of an unknown kind, None.

    A style is an artist where its name is a proper name, and a technique otherwise.
    """
    if kind == "style":
        words = name.split()
        kind = "artist" if is_proper_name(words) and not _TECHNIQUE.search(words[-1]) else "technique"
    return kinds().get(kind)


def evaluation_prompts(concept: Concept) -> tuple[str, ...]:
    """Return prompts to evaluate a concept with, none of which erases; of a concept with prompts of its own, none."""
    found = []
    for part in concept.parts:
        defaults = defaults_of(part.kind, part.name)
        found += [] if defaults is None or part.prompts else [fill(text, part.name) for text in defaults.evaluate]
    used = {*concept.forget_prompts, *concept.retain_prompts}
    return tuple(prompt for prompt in found if prompt not in used)


def complete(description: Any) -> Any:
    """Add the defaults of its kind to a concept's description, which wins over them.

    A description with templates, prompts or parts is complete, and its kind is all that is looked at. So is one of an
    unknown kind: this function does not check descriptions. An artist or a technique is a style.
    """
    if not isinstance(description, Mapping):
        return description
    defaults = defaults_of(str(description.get("kind")), str(description.get("name", "")))
    if defaults is None:
        return description
    described = {**description, "kind": defaults.kind or description["kind"]}
    if {"templates", "prompts", "combined"} & described.keys():
        return described
    synonyms = described.get("synonyms")
    names = [str(described.get("name", "")), *map(str, synonyms if isinstance(synonyms, list | tuple) else ())]
    own: dict[str, Any] = {"templates": defaults.templates, "anchor": defaults.anchor}
    own |= {"anchor_templates": defaults.anchor_templates}
    own |= {"retain": without_names(defaults.retain, names), "others": defaults.retained_prompts(names)}
    return laid_over(own, described)
