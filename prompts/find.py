"""Find a concept by what a person types."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from erase_concept.errors import RequestError
from erase_concept.files import is_there, mistaken_for, read_yaml
from erase_concept.prompts import custom
from erase_concept.prompts.catalog import catalog
from erase_concept.prompts.concept import Concept, combine, parse, plain_name
from erase_concept.prompts.kinds import complete, without_names

GENERAL = ("imagenette", "unsafe", "styles")  # the catalogues for a model that has none of its own
# What stands before the colon of KIND:NAME, and the kinds that a known concept of that name may have.
KINDS = {
    "object": ("object",),
    "style": ("style",),
    "artist": ("style",),
    "technique": ("style",),
    "person": ("person",),
    "character": ("character",),
    "brand": ("brand",),
    "unsafe": ("unsafe", "nudity"),
}
_DESCRIPTIONS = (".yaml", ".yml")
_PROMPTS = (".csv", ".txt")

ConceptSource: TypeAlias = "str | Path | Concept | Mapping[str, Any] | Sequence[ConceptSource]"


def find_concept(
    what: ConceptSource,
    catalogs: Sequence[str] = GENERAL,
    changes: Callable[[Concept], Mapping[str, Any]] = lambda _: {},
) -> Concept:
    """Return the concept that ``what`` names; of a list, the concept that erases all of them together.

    ``what`` is the name of a concept in the ``catalogs``, a kind and a name ("person:Ada Lovelace"), a kind and a
    folder of images, the path of a YAML file or of a prompt file (``.csv`` or ``.txt``), or a description as
    ``Concept.to_dict`` returns it. ``changes`` returns other values for some fields of a concept that is named; one
    that is described stays as it is. Raises RequestError for a name that is not known and has no kind, when a file or a
    description is not a concept, and when a list is empty.
    """
    if isinstance(what, Concept):
        return what
    if isinstance(what, Mapping):
        return _described(what, str(what.get("name", "description")))
    if not isinstance(what, str | Path):
        if not isinstance(what, Sequence) or not what:
            raise RequestError("concept", what, "at least one is needed")
        return combine([find_concept(one, catalogs, changes) for one in what])
    suffix = Path(what).suffix.lower()
    if suffix in _DESCRIPTIONS:
        return _read(Path(what))
    if suffix in _PROMPTS:
        return custom.from_prompts(Path(what), catalogs)
    found = _named(str(what), catalogs)
    return change(found, _retainable(changes(found), found), str(what))


def change(concept: Concept, values: Mapping[str, Any], name: str = "") -> Concept:
    """Return a concept with other values of some fields; raises RequestError for a bad one, with the concept's name."""
    try:
        return concept.changed(values)
    except ValueError as problem:
        raise RequestError("concept", name or concept.name, str(problem)) from None


def _retainable(values: Mapping[str, Any], concept: Concept) -> dict[str, Any]:
    """Return other values of a concept's fields, without names and prompts to retain that name the concept itself."""
    names = [str(values.get("name", concept.name)), *values.get("synonyms", concept.synonyms)]
    return {key: without_names(value, names) if key in ("retain", "others") else value for key, value in values.items()}


def _named(name: str, catalogs: Sequence[str]) -> Concept:
    known = _known(catalogs)
    if (found := known.get(plain_name(name))) is not None:
        return found
    kind, colon, rest = name.partition(":")
    first, *more = (part.strip() for part in (rest if colon else name).split(","))
    if more and (not colon or any(plain_name(part) in known or part.split(":")[0] in KINDS for part in more)):
        raise RequestError("concept", name, f"looks like a list: give {first!r} and each of the others by itself")
    if colon and kind.strip().lower() in KINDS:
        return _of_kind(kind.strip().lower(), rest, catalogs)
    first, *others = (kind for kind in KINDS if kind not in ("artist", "technique"))
    what = f"say what it is: {first}:{name}, {':…, '.join(others[:-1])}:… or {others[-1]}:…"
    if is_there(name) and Path(name).is_dir():
        raise RequestError("concept", name, f"a folder of images needs a kind; {what}")
    if re.fullmatch(r"\w{2,}", kind) and colon:
        raise RequestError("concept", name, f"no such kind as {kind}; allowed: {', '.join(KINDS)}")
    near = [known[one] for one in difflib.get_close_matches(plain_name(name), known, n=3, cutoff=0.75)]
    if near:
        meant = " or ".join(dict.fromkeys(one.key or one.name for one in near))
        raise RequestError("concept", name, f"unknown concept; did you mean {meant}? Or {what}")
    if "/" in name or "\\" in name:
        raise RequestError("concept", name, f"no such file or folder, and no known concept; {what}")
    raise RequestError("concept", name, f"not a known concept; {what}")


def _of_kind(kind: str, name: str, catalogs: Sequence[str]) -> Concept:
    """Return the concept of a kind and a name. A folder of images is named after the folder, and is never known."""
    folder = Path(name)
    if name.strip() and is_there(folder) and folder.is_dir():
        return custom.from_kind(kind, re.sub(r"[_-]", " ", folder.resolve().name), catalogs, images=name)
    found = _known(catalogs).get(plain_name(name))
    return found if found is not None and found.kind in KINDS[kind] else custom.from_kind(kind, name, catalogs)


def _known(catalogs: Sequence[str]) -> dict[str, Concept]:
    """Return the concepts of catalogues by their keys, names and synonyms. Keys come first, and the first catalogue."""
    concepts = [(key, found) for own in catalogs for key, found in catalog(own).concepts.items()]
    known = {plain_name(key): found for key, found in reversed(concepts)}
    for _, found in concepts:
        for name in (found.name, *found.synonyms):
            known.setdefault(plain_name(name), found)
    # A style's name alone can mean many things; "sketch style" says what is meant.
    return {f"{name} style": found for name, found in known.items() if found.kind == "style"} | known


def _read(file: Path) -> Concept:
    if what := mistaken_for(file):
        raise RequestError("concept", file, what)
    try:
        return _described(read_yaml(file), str(file))
    except RequestError:
        raise
    except ValueError as problem:
        raise RequestError("concept", file, f"not a readable concept: {problem}") from None


def _described(description: object, where: str) -> Concept:
    try:
        return parse(complete(description))
    except ValueError as problem:
        raise RequestError("concept", where, f"not a readable concept: {problem}") from None
