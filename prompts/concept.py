"""A concept: what is to be erased, what takes its place, and what must stay.

A concept is a name put into sentence templates. ``{o}`` in a template stands for the name with its article (``a
church``, ``an umbrella``) and ``{O}`` for the bare name, so the same templates make the prompts of the concept, of its
anchor and of everything to be retained, one matching the other sentence by sentence.

Several concepts that are erased together are a concept too, made of parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.prompts.article import with_article

Kind = Literal["object", "style", "nudity", "person", "custom", "several"]


def fill(template: str, name: str) -> str:
    """Fill ``{o}`` with the name and its article, where it takes one, and ``{O}`` with the name alone."""
    if "{o}" not in template:
        return template.replace("{O}", name)
    return template.replace("{o}", with_article(name)).replace("{O}", name)


@dataclass(frozen=True)
class Concept:
    """What is erased (``name``), what it is remapped to (``anchor``), and what stays (``retain`` and ``others``).

    ``templates`` make the prompts; ``synonyms`` are other names of the concept, erased in the same sentences;
    ``others`` are further prompts to retain as they stand, such as the empty one. An empty anchor is the empty prompt.
    ``key`` is the name under which it is found, where that is not the name itself.

    ``prompts`` in the place of templates are forgotten as they stand, whatever they say, and the empty prompt is what
    they become. ``images`` is a folder of images that show the concept, to be used in the place of sampled ones.
    A concept that has ``combined`` others erases them together: name, kind ("several") and these are all that it has.
    """

    name: str
    kind: Kind
    anchor: str = ""
    templates: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    key: str = ""
    prompts: tuple[str, ...] = ()
    images: str = ""
    combined: tuple[Concept, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError when a template has no place for the name, or when nothing or the concept is retained."""
        if (self.kind == "several") != bool(self.combined):
            raise ValueError("a concept of the kind several, and no other, combines others")
        if self.combined:
            if any(part.combined for part in self.combined):
                raise ValueError("a concept that is combined with others combines none itself")
            if self.anchor or self.templates or self.retain or self.others or self.synonyms or self.prompts:
                raise ValueError("a concept of parts has nothing else: anchors, templates and the rest are its parts'")
            return
        for template in self.templates:
            if "{o}" not in template and "{O}" not in template:
                raise ValueError(f"template {template!r} has no place for the name: it needs {{o}} or {{O}}")
        if self.prompts and (self.anchor or self.templates or self.synonyms or self.retain):
            raise ValueError("prompts that are forgotten as they stand have no anchor, templates, synonyms or retain")
        if not self.templates and not self.prompts:
            raise ValueError("a concept needs at least one template")
        if not self.retain and not self.others:
            raise ValueError("a concept needs something to retain: names in retain, or prompts in others")
        for name in (self.name, *self.synonyms):
            if name == self.anchor or name in self.retain:
                raise ValueError(f"{name!r} cannot be its own anchor or be retained")

    @property
    def parts(self) -> tuple[Concept, ...]:
        """The parts, or the concept itself where it has none."""
        return self.combined or (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """What is erased: the name and its synonyms, or the prompts themselves, of every part."""
        return tuple(name for part in self.parts for name in part.prompts or (part.name, *part.synonyms))

    @property
    def replacement(self) -> str:
        """What it is remapped to, in words: the anchor, or those of the parts."""
        anchors = dict.fromkeys(part.anchor or "the empty prompt" for part in self.combined)
        return in_words(tuple(anchors)) if anchors else self.anchor

    @property
    def forget_prompts(self) -> tuple[str, ...]:
        """The prompts whose images are to lose the concept; of parts, those of the first one first."""
        return tuple(
            prompt for part in self.parts for name in (part.name, *part.synonyms) for prompt in part.prompts_for(name)
        )

    def remapped_to(self, name: str) -> tuple[str, ...]:
        """Return what each forget prompt becomes, in the same order, when the concept becomes ``name``."""
        return self.prompts_for(name) * (1 + len(self.synonyms))

    @property
    def retain_prompts(self) -> tuple[str, ...]:
        """The prompts whose images are to stay as they are, without repetition."""
        named = (prompt for part in self.parts for name in part.retain for prompt in part.prompts_for(name))
        return tuple(dict.fromkeys((*named, *(prompt for part in self.parts for prompt in part.others))))

    def prompts_for(self, name: str) -> tuple[str, ...]:
        """Return the same sentences, in the same order, about ``name``; about nothing, each is the empty prompt.

        Prompts that stand as they are have one thing alone that they are about.
        """
        if not name:
            return ("",) * len(self.templates or self.prompts)
        return self.prompts or tuple(fill(template, name) for template in self.templates)

    def without_conflicts(self, erased: Sequence[Concept]) -> Concept:
        """Return the concept as it is erased together with others, whose names nothing of it holds as whole words.

        What they erase is neither retained nor in a template; an anchor that they erase gives way to the first retained
        name that is left, or to the empty prompt. Raises ValueError when no template is left, or nothing to retain.
        """
        names = [name for other in erased for name in other.names]
        words = whole_words(names)

        def left(texts: Sequence[str]) -> tuple[str, ...]:
            return tuple(text for text in texts if not words.search(re.sub(r"\{[oO]\}", "", text)))

        retain = left(self.retain)
        anchor = self.anchor if left([self.anchor]) else next(iter(retain), "")
        return replace(self, anchor=anchor, templates=left(self.templates), retain=retain, others=left(self.others))

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and strings, as they stand in a recipe."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["combined"] = [part.to_dict() for part in self.combined]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items() if value}


def whole_words(names: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern that finds any of the names as whole words, in whatever case."""
    return re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names) or "(?!)", re.IGNORECASE)


def combine(found: Sequence[Concept]) -> Concept:
    """Return the concept that erases all of the given ones at once; of a single one, itself.

    Raises RequestError when one is named twice, or when nothing is left to retain.
    """
    parts = tuple(part for one in found for part in one.parts)
    if len(parts) == 1:
        return parts[0]
    for first, second in combinations(parts, 2):
        if twice := {name.casefold() for name in first.names} & {name.casefold() for name in second.names}:
            raise RequestError("concept", second.key or second.name, f"{min(twice)!r} is named twice")
    name = in_words([part.name for part in parts])
    try:
        rest = [[other for other in parts if other is not part] for part in parts]
        whole = Concept(
            name,
            "several",
            combined=tuple(part.without_conflicts(others) for part, others in zip(parts, rest, strict=True)),
        )
    except ValueError as problem:
        raise RequestError("concept", name, f"erased together, they leave too little: {problem}") from None
    if not any(whole.retain_prompts):
        raise RequestError("concept", name, "erased together, they leave nothing to retain")
    return whole


def in_words(names: Sequence[str]) -> str:
    """Return names as a sentence lists them: church, dog and sketch."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def parse(description: Any) -> Concept:
    """Build a concept from a mapping such as ``to_dict`` returns; raises ValueError naming the first bad field."""
    try:
        return TypeAdapter(Concept).validate_python(description)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'concept'}: {first['msg']}") from None
