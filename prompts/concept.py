"""The concept: what is erased, what replaces it, and what is retained.

A concept is a name and sentence templates. In a template, ``{o}`` is the name with its article (``a church``, ``an
umbrella``) and ``{O}`` is the name alone. The same templates make the prompts of the concept, of its anchor and of the
retained names, so these prompts correspond one to one.

Several concepts that are erased together are one concept with parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import RequestError, did_you_mean
from erase_concept.prompts.article import with_article

Kind = Literal["object", "style", "person", "character", "brand", "nudity", "unsafe", "custom", "several"]
_PLACES = re.compile(r"\{[oO]\}")
_MOST_PROMPTS, _MOST_CHARACTERS = 100_000, 1 << 26  # of a concept
_MOST_PARTS = 1000  # UCE's authors erase a thousand artists


def fill(template: str, name: str) -> str:
    """Fill ``{o}`` with the name and its article, where it takes one, and ``{O}`` with the name alone."""
    if "{o}" not in template:
        return template.replace("{O}", name)
    return template.replace("{o}", with_article(name)).replace("{O}", name)


@dataclass(frozen=True)
class Concept:
    """What is erased (``name``), what it is remapped to (``anchor``), and what is retained (``retain``, ``others``).

    ``templates`` make the prompts. ``synonyms`` are further names of the concept and are erased in the same sentences.
    ``anchor_templates`` say what the forget prompts become, one sentence for each template, about the anchor or about
    nothing in particular: "a painting" for "a painting in the style of {O}". Without them, the templates say it of the
    anchor.
    ``retain`` are names that are retained in these sentences, ``others`` are prompts that are retained word for word.
    An empty anchor is the empty prompt. ``key`` is the key in its catalogue, where that is not the name.

    A concept can have ``prompts`` in place of templates: they are forgotten word for word, and their anchor is the
    empty prompt. ``images`` is a folder of images that show the concept and replace sampled ones. ``combined`` are
    concepts that are erased together. Such a concept has the kind "several", a name, and nothing else.
    """

    name: str
    kind: Kind
    anchor: str = ""
    templates: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    anchor_templates: tuple[str, ...] = ()
    key: str = ""
    prompts: tuple[str, ...] = ()
    images: str = ""
    combined: tuple[Concept, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError when a template lacks the name, when nothing is retained, or when the concept itself is."""
        if (self.kind == "several") != bool(self.combined):
            raise ValueError("a concept of the kind several combines others, and no other kind does")
        if self.combined:
            if any(part.combined for part in self.combined):
                raise ValueError("a concept that is part of another combines none itself")
            own = (self.anchor, self.templates, self.anchor_templates, self.retain, self.others, self.synonyms)
            if any(own) or self.prompts:
                raise ValueError(
                    "a concept with parts has nothing else: anchor, templates and the like belong to its parts"
                )
            return
        for template in self.templates:
            if not _PLACES.search(template):
                raise ValueError(f"template {template!r} has no place for the name: write {{o}} or {{O}} in it")
        if self.anchor_templates and len(self.anchor_templates) != len(self.templates):
            raise ValueError(
                f"anchor_templates must hold one sentence for each template: {len(self.anchor_templates)} for "
                f"{len(self.templates)}"
            )
        for template in self.anchor_templates:
            if not self.anchor and _PLACES.search(template):
                raise ValueError(f"anchor template {template!r} has a place for the anchor, but there is no anchor")
        if self.prompts and (self.anchor or self.templates or self.synonyms or self.retain):
            raise ValueError("a concept with prompts has no anchor, templates, synonyms or retain")
        if not self.templates and not self.prompts:
            raise ValueError("a concept needs at least one template")
        self._check_size()
        if not self.retain and not self.others:
            raise ValueError("a concept needs something to retain: names in retain, or prompts in others")
        for name in (self.name, *self.synonyms):
            if name == self.anchor or name in self.retain:
                raise ValueError(f"{name!r} cannot be its own anchor or be retained")

    def _check_size(self) -> None:
        """Raise ValueError for too many or too long prompts: names and templates multiply."""
        names = (self.name, *self.synonyms, *self.retain)
        count = len(names) * len(self.templates) + len(self.prompts) + len(self.others)
        if count > _MOST_PROMPTS:
            raise ValueError(f"has at most {_MOST_PROMPTS:,} prompts, but its names and templates make {count:,}")
        longest = max(map(len, (*names, self.anchor)))
        templates = (*self.templates, *self.anchor_templates)
        size = len(names) * sum(len(text) + len(_PLACES.findall(text)) * longest for text in templates)
        if size > _MOST_CHARACTERS:
            raise ValueError(f"its prompts have at most {_MOST_CHARACTERS:,} characters together, not {size:,}")

    @property
    def parts(self) -> tuple[Concept, ...]:
        """The parts, or the concept itself where it has none."""
        return self.combined or (self,)

    @property
    def common_kind(self) -> Kind:
        """The kind of all parts, or "several" where they differ."""
        kinds = {part.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else "several"

    @property
    def names(self) -> tuple[str, ...]:
        """What is erased: for every part, its name and synonyms, or its prompts."""
        return tuple(name for part in self.parts for name in part.prompts or (part.name, *part.synonyms))

    @property
    def replacement(self) -> str:
        """What the concept is remapped to, in words: the anchor, or the anchors of the parts."""
        if self.combined:
            return in_words(tuple(dict.fromkeys(part.replacement or "the empty prompt" for part in self.combined)))
        return self.anchor or next(iter(self.anchor_templates), "")

    @property
    def forget_prompts(self) -> tuple[str, ...]:
        """The prompts whose images must lose the concept, part by part."""
        return tuple(
            prompt for part in self.parts for name in (part.name, *part.synonyms) for prompt in part.prompts_for(name)
        )

    @property
    def anchor_prompts(self) -> tuple[str, ...]:
        """What each of the forget prompts becomes, in the same order."""
        if self.combined:
            return tuple(prompt for part in self.combined for prompt in part.anchor_prompts)
        if not self.anchor_templates:
            return self.remapped_to(self.anchor)
        return tuple(fill(template, self.anchor) for template in self.anchor_templates) * (1 + len(self.synonyms))

    def remapped_to(self, name: str) -> tuple[str, ...]:
        """Return the prompts that replace the forget prompts, in the same order, when ``name`` replaces the concept."""
        return self.prompts_for(name) * (1 + len(self.synonyms))

    @property
    def retain_prompts(self) -> tuple[str, ...]:
        """The prompts whose images must stay as they are, each once."""
        named = (prompt for part in self.parts for name in part.retain for prompt in part.prompts_for(name))
        return tuple(dict.fromkeys((*named, *(prompt for part in self.parts for prompt in part.others))))

    def prompts_for(self, name: str) -> tuple[str, ...]:
        """Return the templates filled with ``name``, in the same order; without a name, as many empty prompts.

        A concept with prompts returns these, whatever the name.
        """
        if not name:
            return ("",) * len(self.templates or self.prompts)
        return self.prompts or tuple(fill(template, name) for template in self.templates)

    def without_conflicts(self, erased: Sequence[Concept]) -> Concept:
        """Return the concept without the names that are erased together with it.

        When several concepts are erased together, none of them is retained by another, is its anchor, or stands in its
        templates. Names are compared as whole words. An anchor that is erased is replaced by the first retained name
        that is left, or by the empty prompt; an anchor template that names it, by the empty prompt. Raises ValueError
        when no template is left, or nothing to retain.
        """
        texts = (*self.templates, *self.anchor_templates, *self.retain, *self.others, self.anchor)
        names = [name for other in erased for name in other.names]
        words = whole_words(names_within(_PLACES.sub("", "\n".join(texts)), names))

        def without(texts: Sequence[str]) -> tuple[str, ...]:
            return tuple(text for text in texts if not words.search(_PLACES.sub("", text)))

        templates, retain, others = without(self.templates), without(self.retain), without(self.others)
        anchor = self.anchor if without([self.anchor]) else next(iter(retain), "")
        anchored = tuple(
            becomes if without([becomes]) and (anchor or not _PLACES.search(becomes)) else ""
            for template, becomes in zip(self.templates, self.anchor_templates, strict=False)
            if template in templates
        )
        return replace(
            self, anchor=anchor, templates=templates, anchor_templates=anchored, retain=retain, others=others
        )

    def changed(self, values: Mapping[str, Any]) -> Concept:
        """Return the concept with other values of some fields; raises ValueError for a bad one. See ``laid_over``."""
        return parse(laid_over(self.to_dict(), values)) if values else self

    def to_dict(self) -> dict[str, Any]:
        """Return the concept as plain lists and strings, as recipes hold it; empty fields are left out."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["combined"] = [part.to_dict() for part in self.combined]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items() if value}


def laid_over(description: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a concept's description with other values of some fields.

    Where the anchor or the templates change and the anchor templates are not given with them, these follow when they
    speak of the anchor: about another anchor they stay, and for other templates they are those, with the article that
    the anchor takes. Anchor templates that speak of nothing in particular are dropped.
    """
    laid = {**description, **values}
    if "anchor_templates" in values or not {"anchor", "templates"} & values.keys():
        return laid
    old = description.get("anchor_templates", ())
    speak = bool(old and laid.get("anchor")) and all(map(_PLACES.search, old))
    if not speak:
        laid.pop("anchor_templates", None)
    elif "templates" in values:
        laid["anchor_templates"] = [text.replace("{O}", "{o}") for text in values["templates"]]
    return laid


@lru_cache(4096)
def _folded(text: str) -> str:
    """Return a text as patterns compare it when they ignore its case; they take a Turkish i without a dot for an i."""
    return text.upper().casefold()


def plain_name(name: str) -> str:
    """Return a name as it is compared: in small letters, with single spaces in the place of underscores and hyphens."""
    return " ".join(re.sub(r"[_-]", " ", name).casefold().split())


def names_within(text: str, names: Sequence[str]) -> list[str]:
    """Return the names that a text has in it, whole words or not: of many it has few, and only these need a pattern."""
    folded = _folded(text)
    return [name for name in names if _folded(name) in folded]


def whole_words(names: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the names as whole words, in upper or lower case."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names)) or '(?!)'})(?!\w)", re.IGNORECASE)


def combine(concepts: Sequence[Concept]) -> Concept:
    """Return one concept that erases all of these together; a single concept is returned as it is.

    Raises RequestError when a name occurs twice, or when too little is left to erase with or to retain.
    """
    parts = tuple(part for one in concepts for part in one.parts)
    if len(parts) == 1:
        return parts[0]
    if len(parts) > _MOST_PARTS:
        raise RequestError("concept", len(parts), f"at most {_MOST_PARTS:,} are erased together")
    seen: set[str] = set()
    for part in parts:
        names = {name.casefold() for name in part.names}
        if shared := names & seen:
            raise RequestError("concept", part.key or part.name, f"{min(shared)!r} is named twice")
        seen |= names
    name = in_words([part.name for part in parts])
    try:
        combined = tuple(part.without_conflicts([other for other in parts if other is not part]) for part in parts)
        together = Concept(name, "several", combined=combined)
    except ValueError as problem:
        raise RequestError("concept", name, f"too little is left when they are erased together: {problem}") from None
    # Some methods' authors retain the empty prompt alone; that is not what the other concepts took away.
    if not any(together.retain_prompts) and any(prompt for part in parts for prompt in part.retain_prompts):
        raise RequestError("concept", name, "nothing is left to retain when they are erased together")
    return together


def in_words(names: Sequence[str]) -> str:
    """Return names as a list in words: "church, dog and sketch"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def parse(description: Any) -> Concept:
    """Read a concept from a mapping as ``to_dict`` returns it; raises ValueError that names the first bad field."""
    allowed = [field.name for field in fields(Concept)]
    nested = description.get("combined") if isinstance(description, Mapping) else None
    for part in (description, *(nested if isinstance(nested, list | tuple) else ())):
        for key in part if isinstance(part, Mapping) else ():
            if key not in allowed:
                hint = did_you_mean(str(key), allowed)
                raise ValueError(f"no such field as {key!r}; {hint}allowed: {', '.join(allowed)}")
    try:
        return TypeAdapter(Concept).validate_python(description)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'concept'}: {first['msg']}") from None
