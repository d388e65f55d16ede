"""Benchmarks, one YAML file each: prompts, which of them ask for the concept, judges, metrics and settings."""

from __future__ import annotations

from dataclasses import field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from erase_concept.errors import RequestError
from erase_concept.files import is_there, read_yaml

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Benchmark:
    """What is asked, and what is measured.

    ``prompts`` is the name or the path of a prompt set. With ``catalog`` the prompts are made from that catalogue's
    labels for the concept; with neither the request must name them. ``forget`` says which prompts ask for the erased
    concept: all, those that bear its label, or none. ``labels`` is the kind of these labels, where it is not the
    concept's own. ``same_prompts`` asks in the very prompts of the erasing, too: a model of labels knows no others.

    ``settings`` are those of the sampling (``steps``), of judges (``judge.threshold``) and of metrics
    (``metric.extractor``). Only images of ``size`` pixels will do, where it is given. ``default_for`` are the kinds of
    concept for which this benchmark is taken where none is named. ``blur`` lets reports look for images to blur.
    """

    about: str
    metrics: tuple[str, ...]
    prompts: str = ""
    catalog: str = ""
    forget: Literal["all", "label", "none"] = "label"
    labels: Literal["", "object", "style"] = ""
    same_prompts: bool = False
    judges: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    default_for: tuple[str, ...] = ()
    blur: bool = True
    name: str = ""
    own: bool = False  # a user's file: what it names must be there

    @property
    def title(self) -> str:
        """The name as reports show it: of a user's file without its folder."""
        return Path(self.name).name if self.own else self.name


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Return the built-in benchmarks by name."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: replace(_read(file), name=file.stem) for file in files}


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name, or read one from a YAML file; raises RequestError that names the first bad key.

    Of a path to prompts that is not there, the folder of the file is tried.
    """
    if name in benchmarks():
        return benchmarks()[name]
    if not name.endswith((".yaml", ".yml")):
        allowed = f"unknown benchmark; allowed: {', '.join(benchmarks())}, or a YAML file"
        raise RequestError("benchmark", name, allowed)
    file = Path(name)
    try:
        found = _read(file)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        keys = ", ".join(key for key in Benchmark.__dataclass_fields__ if key not in ("name", "own"))
        raise RequestError("benchmark", name, f"{where}: {first['msg']}; keys: {keys}") from None
    except ValueError as problem:
        raise RequestError("benchmark", name, str(problem)) from None
    if not found.metrics:
        raise RequestError("benchmark", name, "metrics: at least one is needed")
    beside = file.parent / found.prompts
    prompts = str(beside) if is_there(beside) and beside.is_file() and not is_there(found.prompts) else found.prompts
    return replace(found, prompts=prompts, name=name, own=True)


def _read(file: Path) -> Benchmark:
    """Read a benchmark's file; raises ValidationError for what is none, and ValueError for what is no YAML."""
    content = read_yaml(file)
    values = {"about": str(file), **content} if isinstance(content, dict) else content
    return TypeAdapter(Benchmark).validate_python(values)
