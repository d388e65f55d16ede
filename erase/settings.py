"""Settings: frozen dataclasses whose fields carry their bounds and a sentence each, all checked here.

A method's, a judge's or a benchmark's settings are one such class. The command's ``--set`` options, ``list``, the
report and the docs read what the fields say of themselves.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from erase_concept.errors import RequestError
from erase_concept.files import parse_yaml

_T = TypeVar("_T")
_CONFIG = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def described(sentence: str = "", *, source: str = "", **bounds: Any) -> Any:
    """Describe a setting, for ``Annotated``: what it does, its bounds (``ge``, ``gt``, ``le``, ``lt``), where from.

    ``source`` says where the default value comes from: a paper, its authors' code, or "ours".
    """
    if sentence:
        bounds["description"] = sentence
    return Field(json_schema_extra={"source": source}, **bounds)


def _hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields that a class itself declares, with what is said of them."""
    every = get_type_hints(cls, include_extras=True)
    return {name: every[name] for name in inspect.get_annotations(cls)}


@dataclass_transform(frozen_default=True)
def settings(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass that checks its fields whenever one is made. Its numbers are finite.

    A subclass may give a field another default and no description: it keeps the sentence and the bounds, but not the
    source, which was that of the other default. Raises pydantic's ValidationError, a ValueError, for a value out of
    bounds and for a field that it does not have.
    """
    inherited = {name: hint for base in reversed(cls.__mro__[1:]) for name, hint in _hints(base).items()}
    for name, hint in _hints(cls).items():
        if name in inherited and get_origin(inherited[name]) is Annotated:
            kind, own = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
            said = get_args(inherited[name])[1:]
            if not any(isinstance(one, FieldInfo) and one.description for one in own):
                extended: Any = (kind, *said, *(own or (described(),)))
                cls.__annotations__[name] = Annotated[extended]
    made: Any = pydantic_dataclass(cast(Any, cls), frozen=True, config=_CONFIG)
    return made


@settings
class NoSettings:
    """The settings of what has none."""


@dataclass(frozen=True)
class Setting:
    """What a field says of itself: name, default, type and range in words, sentence, source of the default."""

    name: str
    default: Any
    allowed: str
    sentence: str
    source: str


def settings_of(cls: Any) -> dict[str, Setting]:
    """Return what the settings of a class say of themselves, by name, in the order of their declaration."""
    found = {}
    for field in dataclasses.fields(cls):
        info: FieldInfo = cls.__pydantic_fields__[field.name]
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        sentence, source = info.description or "", str(extra.get("source", ""))
        found[field.name] = Setting(field.name, default, _allowed(info), sentence, source)
    return found


def check_settings(cls: type[_T], values: Mapping[str, Any], prefix: str = "") -> _T:
    """Make settings of plain values; raises RequestError that names the first bad one, behind ``prefix``.

    A value is converted as pydantic converts it, so a number may come as text.
    """
    known = [field.name for field in dataclasses.fields(cast(Any, cls))]
    for name, value in values.items():
        if name not in known:
            raise RequestError(f"{prefix}{name}", value, f"no such setting; there are: {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as problem:
        first = problem.errors()[0]
        name = ".".join(map(str, first["loc"][:1])) or cls.__name__
        given = first["input"] if first["loc"] else ""
        raise RequestError(f"{prefix}{name}", given, _sentence(first["msg"])) from None


def changed_settings(part: Any) -> dict[str, Any]:
    """Return the values of settings that differ from their defaults, as they stand in YAML."""
    values = {field.name: (getattr(part, field.name), field.default) for field in dataclasses.fields(part)}
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, (value, default) in values.items()
        if value != default
    }


def read_assignments(texts: Iterable[str], setting: str = "set") -> dict[str, Any]:
    """Read KEY=VALUE texts as one mapping, each value as ``read_value`` does.

    Raises RequestError for another form, which names ``setting``.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RequestError(setting, text, "must be KEY=VALUE")
        found[key.strip()] = read_value(value)
    return found


def read_value(text: str) -> Any:
    """Read one value as YAML does, and numbers such as 1e-5; what is neither is text."""
    try:
        value = parse_yaml(text)
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value
    except ValueError:
        return text


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``over`` on ``base``, mapping by mapping; a concept is replaced as a whole.

    Steps and epochs are two ways to say one thing: those of ``over`` replace either of ``base``.
    """
    merged = dict(base)
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if over.get(name) is not None:
            merged.pop(other, None)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "concept"
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _allowed(info: FieldInfo) -> str:
    """Return a field's type and range in words, such as "number from 0 to 1" or "adam, adamw"."""
    kinds = [kind for kind in (get_args(info.annotation) or (info.annotation,)) if kind is not type(None)]
    if get_origin(info.annotation) is not None and all(isinstance(kind, str) for kind in kinds):
        return ", ".join(kinds)
    if get_origin(info.annotation) is tuple:
        return "list of whole numbers"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    words = " or ".join(dict.fromkeys(names.get(kind, getattr(kind, "__name__", str(kind)).lower()) for kind in kinds))
    for bound in info.metadata:
        for kind, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if isinstance(bound, getattr(annotated_types, kind.capitalize())):
                words += f", {sign} {getattr(bound, kind):g}"
    return words


def _sentence(message: str) -> str:
    """Return pydantic's message as the end of our line."""
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]
