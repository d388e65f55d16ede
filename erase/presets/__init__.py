"""Presets: the settings that a run starts from, by base model, kind of concept and method.

The presets of this folder say for a base model which method each kind of concept takes, and what differs from the
method's own defaults. ``authors/METHOD.yaml`` holds the settings of a method's authors. Its entries are kinds of
concepts, and "any" is every other kind. A file that begins with ``like: METHOD`` says only what differs from that
method's file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from erase_concept.errors import RequestError
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.settings import merge

PRESETS = ("default", "paper", "latest-code")
_FOLDER = Path(__file__).parent
_GENERAL = "stable-diffusion"  # the defaults of every model that is not built in


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KindSettings:
    """A method's settings for one kind of concept: the parts of a recipe that differ from the method's defaults.

    ``concept`` holds fields of the concept that the authors chose: prompts, anchor, what is retained. With ``like``
    the entry is another kind's, and has nothing else. ``source`` says where the settings stand.
    """

    like: str = ""
    source: str = ""
    concept: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def assignments(self) -> tuple[str, ...]:
        """Return the settings as ``--set`` takes them, such as ``mask.guidance=7.5``."""
        parts = {"mask.": self.mask, "data.": self.data, "": self.settings}
        return tuple(
            f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}"
            for prefix, values in parts.items()
            for key, value in values.items()
        )


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AuthorsSettings:
    """The settings of a method's authors by kind of concept. ``source`` is their code.

    ``paper`` is what they published with their paper. ``latest_code`` is what their code does since then, where that
    differs. ``differs`` says in one sentence each where this package differs from them, and why.
    """

    source: str
    paper: dict[str, KindSettings]
    latest_code: dict[str, KindSettings] = field(default_factory=dict)
    differs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError when an entry is like one that is not there, or is like another and has more."""
        for entries in (self.paper, self.latest_code):
            for kind, entry in entries.items():
                if entry.like and (entry != KindSettings(like=entry.like) or entry.like not in entries):
                    raise ValueError(f"{kind}: an entry with like has nothing else, and names another entry")

    def of(self, preset: str, kind: str) -> tuple[KindSettings, str]:
        """Return a preset's settings for a kind, and the kind that they are of: the kind itself, or another's."""
        entries = self.latest_code if preset == "latest-code" else self.paper
        while (entry := entries.get(kind, entries.get("any", KindSettings()))).like:
            kind = entry.like
        return entry, kind


@dataclass(frozen=True)
class Preset:
    """What a run starts from: the method, the parts of its recipe, and where these come from, in sentences.

    ``concept`` holds the fields of the concept that the method's authors chose.
    """

    method: str
    parts: dict[str, Any]
    concept: dict[str, Any]
    notes: tuple[str, ...] = ()


@cache
def authors_settings() -> dict[str, AuthorsSettings]:
    """Return the settings of the methods' authors by method; raises ValueError for a file that holds none."""
    found = {}
    for method in sorted(file.stem for file in (_FOLDER / "authors").glob("*.yaml")):
        try:
            found[method] = TypeAdapter(AuthorsSettings).validate_python(_authors_file(method))
        except (ValidationError, OSError) as problem:
            raise ValueError(
                f"authors/{method}.yaml does not hold the settings of a method's authors: {problem}"
            ) from None
    return found


def _authors_file(method: str) -> dict[str, Any]:
    """Return what a method's file says, laid on the file that it is like."""
    values = yaml.safe_load((_FOLDER / "authors" / f"{method}.yaml").read_text(encoding="utf-8"))
    if isinstance(values, dict):
        values = {key.replace("-", "_"): value for key, value in values.items()}
        if "like" in values:
            base = _authors_file(values.pop("like"))
            values = merge(base, values) | {"differs": [*base.get("differs", ()), *values.get("differs", ())]}
    return values


def preset(name: str, model: str, kind: str, method: str | None = None, *, images: bool = False) -> Preset:
    """Return what a run starts from, for a model and a kind of concept; ``images`` says that it has images of its own.

    "default" is what was tried on a built-in model. On any other model it is the authors' settings, and prompts of
    ours. "paper" is the authors' settings and their prompts, "latest-code" those of their code since then. Without a
    method it is the model's default for the kind. Raises RequestError for another name, and for a method whose authors
    have no such settings.
    """
    if name not in PRESETS:
        raise RequestError("preset", name, f"allowed: {', '.join(PRESETS)}")
    builtin = builtin_models().get(model) if name == "default" else None
    values = _defaults()[builtin.preset if builtin else _GENERAL]
    own = values.get(kind) or values["any"]
    own = own.get("with_images", own) if images else own
    chosen = method or own["method"]
    laid_over = _parts(own) if chosen == own["method"] else values["methods"].get(chosen, {})
    if builtin:
        base = {} if chosen == own["method"] else values["methods"]["any"]
        return Preset(chosen, merge(base, laid_over), {})
    authors = authors_settings().get(chosen)
    if name != "default" and authors is None:
        raise RequestError("preset", name, f"{chosen} has no settings of other authors; allowed: default")
    if name == "latest-code" and authors is not None and not authors.latest_code:
        raise RequestError("preset", name, f"the authors of {chosen} changed nothing since the paper; allowed: paper")
    notes: tuple[str, ...] = (
        (f"default for the kind {kind}: {own['reason']}",) if method is None and "reason" in own else ()
    )
    if authors is None:
        return Preset(chosen, merge(values["methods"]["any"], laid_over), {}, notes)
    entry, of = authors.of(name, kind)
    notes += (_origin(authors, entry, of, kind),)
    parts = merge(values["methods"]["any"], _parts(vars(entry)))
    if name == "default":
        return Preset(chosen, merge(parts, laid_over), {}, notes)
    # Prompts for one kind are not sentences about another.
    return Preset(chosen, parts, entry.concept if of == kind else {}, notes)


def default_methods() -> dict[str, tuple[str, str]]:
    """Return the method of each kind of concept on a model that is not built in, and the reason for it."""
    values = _defaults()[_GENERAL]
    return {kind: (entry["method"], entry["reason"]) for kind, entry in values.items() if "method" in entry}


def _parts(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a recipe that an entry holds."""
    return {part: entry[part] for part in ("mask", "data", "settings") if entry.get(part)}


def _origin(authors: AuthorsSettings, entry: KindSettings, of: str, kind: str) -> str:
    source = f"{entry.source}; {authors.source}" if entry.source else authors.source
    if of == kind:
        return f"authors' settings for the kind {kind} ({source})"
    if entry == KindSettings():
        return f"the authors have no settings for the kind {kind}: the method's defaults ({authors.source})"
    return f"the authors have no settings for the kind {kind}: theirs for the kind {of}, prompts of ours ({source})"


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    """Return the presets of base models by name."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
