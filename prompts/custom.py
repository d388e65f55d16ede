"""Concepts that no catalogue has: made from a kind and a name, or from a file of prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.files import mistaken_for, read_text
from erase_concept.prompts.catalog import Catalog, catalog
from erase_concept.prompts.concept import Concept, fill, parse, whole_words
from erase_concept.prompts.kinds import complete, kinds, without_names
from erase_concept.prompts.promptset import read_rows

_MOST_BYTES, _MOST_PROMPTS = 16 << 20, 20_000  # of a file of prompts


def from_kind(kind: str, name: str, own: Sequence[str] = (), *, images: str = "") -> Concept:
    """Return the concept of this kind and name. ``images`` may be a folder of images that show it.

    ``own`` names the model's catalogues. Names of these that stand within an object's name are retained: "parachute"
    for a red parachute. A model that draws a catalogue's objects and styles retains these, and not what is retained of
    other models. Raises RequestError for a name without a word, and for one that the kind's defaults do not fit.
    """
    words = " ".join(name.replace("_", " ").split())
    if not re.search(r"\w", words):
        raise RequestError("concept", f"{kind}:{name}", "needs at least one word behind the colon")
    try:
        found = parse(complete({"name": words, "kind": kind, "images": images}))
    except ValueError as problem:
        raise RequestError("concept", f"{kind}:{words}", str(problem)) from None
    for known in map(catalog, own):
        found = _within_world(found, known) if known.objects and known.styles else found
    if found.kind == "object":
        found = replace(found, retain=tuple(dict.fromkeys((*_names_within(words, own), *found.retain))))
    return found


def from_prompts(file: Path, own: Sequence[str] = ()) -> Concept:
    """Return the concept that a file's prompts describe: a CSV file, or a text file with one prompt per line.

    The prompts are forgotten word for word. No prompt that contains one of them is retained. Raises RequestError when
    the file has no prompt or is not readable.
    """
    if file.suffix.lower() == ".csv":
        found = [row.prompt for row in read_rows(file, setting="concept")]
    elif what := mistaken_for(file):
        raise RequestError("concept", file, what)
    else:
        try:
            found = read_text(file, _MOST_BYTES).splitlines()
        except ValueError as problem:
            raise RequestError("concept", file, f"not a readable text file: {problem}") from None
    prompts = tuple(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if not 0 < len(prompts) <= _MOST_PROMPTS:
        what = f"has more than the {_MOST_PROMPTS:,} prompts that a concept may have" if prompts else "has no prompt"
        raise RequestError("concept", file, what)
    known = [
        prompt
        for one in map(catalog, own)
        for prompt in (*_object_prompts(one, one.labels), *_style_prompts(one, one.styles))
    ]
    return Concept(
        name=file.stem, kind="custom", prompts=prompts, others=kinds()["custom"].retained_prompts(prompts, *known)
    )


def _within_world(concept: Concept, known: Catalog) -> Concept:
    """Return a concept that retains the objects and styles of a catalogue, which are all that the model draws."""
    words = set(concept.name.casefold().split())
    objects = tuple(
        names.label for names in known.objects if not words & {*names.label.split(), *names.synonym.split()}
    )
    styles = tuple(style for style in known.styles if style != concept.name.casefold())
    retain = {"object": objects, "style": styles}.get(concept.kind, ())
    more = without_names(
        [
            *(_object_prompts(known, objects) if concept.kind != "object" else ()),
            *(_style_prompts(known, styles) if concept.kind != "style" else ()),
        ],
        [concept.name],
    )
    return replace(concept, retain=retain, others=(*concept.others, *more))


def _names_within(name: str, own: Sequence[str]) -> list[str]:
    """Return the objects of catalogues that are named within a name, in whole words, and are not the name itself."""
    found = []
    for known in map(catalog, own):
        labels = [label for names in known.objects for label in (names.label, names.synonym)]
        labels += [one.name for key, one in known.concepts.items() if one.kind == "object" and key in known.entries]
        found += [label for label in labels if label.casefold() != name.casefold()]
    return [label for label in found if whole_words([label]).search(name)]


def _object_prompts(known: Catalog, labels: Sequence[str]) -> list[str]:
    return [fill(known.sentences.erase.object[0], label) for label in labels]


def _style_prompts(known: Catalog, styles: Sequence[str]) -> list[str]:
    return [known.sentences.erase.style[0].replace("{s}", style) for style in styles]
