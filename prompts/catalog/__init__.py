"""The catalogues: built-in concepts as data, one YAML file per world.

A catalogue lists concepts under ``entries``, or it lists the objects, styles and sentences of a world made of labels,
and each object and style is a concept. It may do both. Of an entry, ``defaults`` say what it does not say itself, and
its kind what neither says.
"""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.prompts.concept import Concept, fill, parse
from erase_concept.prompts.kinds import complete, without_names

_FOLDER = Path(__file__).parent


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ObjectNames(_Part):
    """The names of one object: its label, a synonym, and a name that no training and no erasing uses."""

    label: str
    synonym: str
    unseen: str


class Sentences(_Part):
    """Sentences with ``{o}``, an object with its article, ``{O}``, the object without, and ``{s}``, a style.

    ``object`` name an object, ``styled`` an object in a style, ``style`` a style alone. ``more_styled`` are further
    sentences of an object in a style, for a style only.
    """

    object: tuple[str, ...] = ()
    styled: tuple[str, ...] = ()
    more_styled: tuple[str, ...] = ()
    style: tuple[str, ...] = ()


class SentenceGroups(_Part):
    """Three groups that do not overlap: to erase with, to evaluate with, and those that no training uses."""

    erase: Sentences = Sentences()
    evaluate: Sentences = Sentences()
    unseen: Sentences = Sentences()


class Catalog(_Part):
    """The concepts of one world. ``folders`` are names of image folders that stand for a concept, such as wnids."""

    name: str
    about: str
    objects: tuple[ObjectNames, ...] = ()
    styles: tuple[str, ...] = ()
    sentences: SentenceGroups = SentenceGroups()
    defaults: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    folders: dict[str, str] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """The objects' labels."""
        return tuple(names.label for names in self.objects)

    def names_of(self, label: str) -> ObjectNames:
        """Return the names of an object; raises ValueError when the catalogue has no such object."""
        return self.objects[self.labels.index(label)]

    @cached_property
    def concepts(self) -> dict[str, Concept]:
        """The concepts by key: objects, then styles, then entries."""
        found = {label: self._object(place) for place, label in enumerate(self.labels)}
        found |= {style: self._style(place) for place, style in enumerate(self.styles)}
        return found | {key: self._entry(key) for key in self.entries}

    def _entry(self, key: str) -> Concept:
        """Return an entry as a concept. It is not among what the catalogue's entries retain together."""
        entry = self.entries[key]
        names = [entry.get("name", key), *entry.get("synonyms", ())]
        shared = dict(self.defaults)
        for field in {"retain", "others"} & shared.keys():
            shared[field] = without_names(shared[field], names)
        # The key of an entry that has its own name is not said twice.
        own = {"name": key} if "name" not in entry else {"key": key}
        return parse(complete({**own, **shared, **entry}))

    def _object(self, place: int) -> Concept:
        """Return an object as a concept. Its anchor is the next object, as SalUn's reference remaps Imagenette's."""
        labels, erase = self.labels, self.sentences.erase
        styled = (template.replace("{s}", style) for template in erase.styled for style in self.styles)
        return Concept(
            name=labels[place],
            kind="object",
            anchor=labels[(place + 1) % len(labels)],
            templates=(*erase.object, *styled),
            retain=labels[place + 1 :] + labels[:place],
            synonyms=(self.objects[place].synonym,),
            others=(*(template.replace("{s}", style) for template in erase.style for style in self.styles), ""),
        )

    def _style(self, place: int) -> Concept:
        """Return a style as a concept. Its templates name every object, so that objects stay as they are."""
        styles, erase = self.styles, self.sentences.erase
        # The sentences name each object by its label and its synonym in turn.
        templates = [
            fill(sentence, (names.label, names.synonym)[turn % 2]).replace("{s}", "{O}")
            for turn, sentence in enumerate((*erase.styled, *erase.more_styled))
            for names in self.objects
        ]
        templates += [template.replace("{s}", "{O}") for template in erase.style]
        return Concept(
            name=styles[place],
            kind="style",
            anchor=styles[(place + 1) % len(styles)],
            templates=tuple(templates),
            retain=styles[place + 1 :] + styles[:place],
            others=(*(fill(template, label) for template in erase.object for label in self.labels), ""),
        )


def read_catalog(file: Path) -> Catalog:
    """Read a catalogue from its YAML file, whose name is the catalogue's; raises ValueError when it describes none."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        return TypeAdapter(Catalog).validate_python({"name": file.stem, **values})
    except (TypeError, yaml.YAMLError, ValidationError) as problem:
        raise ValueError(f"{file} is not a catalogue: {problem}") from None


@cache
def catalogs() -> dict[str, Catalog]:
    """Return the catalogues by name."""
    return {file.stem: read_catalog(file) for file in sorted(_FOLDER.glob("*.yaml"))}


@cache
def folder_names() -> dict[str, str]:
    """Return the names of concepts by the names of folders that stand for them, of all catalogues."""
    return {folder: name for found in catalogs().values() for folder, name in found.folders.items()}


def catalog(name: str) -> Catalog:
    """Return a catalogue by name; raises RequestError when there is none."""
    known = catalogs()
    if name not in known:
        raise RequestError("catalog", name, f"allowed: {', '.join(known)}")
    return known[name]
