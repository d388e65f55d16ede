"""Find a concept by what a person types."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from erase_concept.errors import RequestError
from erase_concept.prompts import custom
from erase_concept.prompts.catalog import catalog
from erase_concept.prompts.concept import Concept, combine, parse, whole_words
from erase_concept.prompts.kinds import complete

GENERAL = ("unsafe",)  # the catalogues for a model that has none of its own
DESCRIBED = (".yaml", ".yml", ".csv", ".txt")  # the files that describe a concept
_WORDS = "words:"

ConceptSource: TypeAlias = "str | Path | Concept | Mapping[str, Any] | Sequence[ConceptSource]"


def find_concept(
    what: ConceptSource,
    catalogs: Sequence[str] = GENERAL,
    changes: Callable[[Concept], Mapping[str, Any]] = lambda _: {},
) -> Concept:
    """Return the concept that ``what`` names; of a list, the concept that erases all of them together.

    ``what`` is a key of one of the ``catalogs``, the path of a YAML file, of a prompt file (``.csv`` or ``.txt``) or of
    a folder of images, a description as ``Concept.to_dict`` returns it, or any other words. Words after ``words:`` are
    never taken for a key or a path. ``changes`` returns other values for some fields of a concept that is named; one
    that is described stays as it is. Raises RequestError when a file or a description is not a concept, when words look
    like a misspelt key, and when a list is empty.
    """
    if isinstance(what, Concept):
        return what
    if isinstance(what, Mapping):
        return _described(what, str(what.get("name", "description")))
    if not isinstance(what, str | Path):
        if not what:
            raise RequestError("concept", what, "at least one is needed")
        return combine([find_concept(one, catalogs, changes) for one in what])
    if Path(what).suffix.lower() in DESCRIBED:
        return _in_file(Path(what), catalogs)
    found = _named(str(what), catalogs)
    try:
        return found.changed(_retainable(changes(found), found))
    except ValueError as problem:
        raise RequestError("concept", str(what), str(problem)) from None


def _retainable(values: Mapping[str, Any], concept: Concept) -> dict[str, Any]:
    """Return other values of a concept's fields, without names and prompts to retain that name the concept itself."""
    own = whole_words([str(values.get("name", concept.name)), *concept.synonyms, *values.get("synonyms", ())])
    return {
        key: [text for text in value if not own.search(text)] if key in ("retain", "others") else value
        for key, value in values.items()
    }


def _in_file(file: Path, catalogs: Sequence[str]) -> Concept:
    """Return the concept that a file describes."""
    if file.suffix.lower() in (".csv", ".txt"):
        return custom.from_prompts(file, catalogs)
    return _read(file)


def _named(name: str, catalogs: Sequence[str]) -> Concept:
    known = {key: found for own in catalogs for key, found in catalog(own).concepts.items()}
    # A style's name alone can mean many things; "sketch style" says what is meant.
    known |= {f"{key} style": found for key, found in known.items() if found.kind == "style"}
    path = Path(name)
    if name in known:
        return known[name]
    if name.startswith(_WORDS):
        return custom.from_words(name.removeprefix(_WORDS), catalogs)
    if path.is_dir():
        return custom.from_images(path, catalogs)
    as_it_is = f"{_WORDS}{name} takes the words as they are"
    if near := difflib.get_close_matches(name, known, n=3, cutoff=0.75):
        raise RequestError("concept", name, f"unknown concept; did you mean {' or '.join(near)}? {as_it_is}")
    if "/" in name or "\\" in name:
        raise RequestError("concept", name, f"no such file or folder; {as_it_is}")
    return custom.from_words(name, catalogs)


def _read(file: Path) -> Concept:
    try:
        return _described(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise RequestError("concept", file, f"not a readable concept: {problem}") from None


def _described(description: object, where: str) -> Concept:
    try:
        return parse(complete(description))
    except ValueError as problem:
        raise RequestError("concept", where, f"not a readable concept: {problem}") from None
