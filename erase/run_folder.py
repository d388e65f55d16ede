"""A run's folder: whether the run in it is complete, and what ``run.json`` says of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from erase_concept.errors import RequestError
from erase_concept.files import LOCK, PARTIAL, atomic_write, file_sha256, is_there, read_json

RUN_FILE = "run.json"  # of a run that erases from a diffusion model
UNLEARN_FILE = "unlearn.json"  # of a classifier's run: neither is taken for the other


class _Base(TypedDict):
    source: str
    unet: str
    folder: NotRequired[str]


class _Earlier(TypedDict):
    concept: dict[str, Any]
    base: str


class _RunInfo(TypedDict):
    """What those who read ``run.json`` rely on. The base is always there."""

    base: _Base
    erased: NotRequired[dict[str, str]]
    checks: NotRequired[dict[str, Any]]
    method: NotRequired[str]
    concept: NotRequired[str]
    mask: NotRequired[dict[str, Any] | None]
    earlier: NotRequired[list[_Earlier]]


class _Images(TypedDict):
    forget: int
    retain: int


class _FirstClassifier(TypedDict):
    source: str
    architecture: str
    sha256: str


class _UnlearnInfo(TypedDict):
    """What those who read ``unlearn.json`` rely on."""

    method: str
    forget: str
    images: _Images
    seed: int
    base: _FirstClassifier
    unlearned: dict[str, str]
    seconds: dict[str, float]
    resumed_at_step: int
    files: dict[str, str]


_RECORDS: dict[str, TypeAdapter[Any]] = {RUN_FILE: TypeAdapter(_RunInfo), UNLEARN_FILE: TypeAdapter(_UnlearnInfo)}


def complete(folder: Path, file: str = RUN_FILE) -> bool:
    """Tell whether a run folder's work is done; ``file`` is the one that is written last."""
    return (folder / file).is_file()


def claimed(out: Path, same: Callable[[Path], bool]) -> bool:
    """Tell whether a folder is a run of the same recipe; refuse one that holds another run or other files.

    ``same`` tells of the recipe's file in the folder whether it says the same.
    """
    file = out / "recipe.yaml"
    if file.exists():
        if not same(file):
            raise RequestError("out", out, "holds a run with another recipe; choose another folder")
        return True
    if out.exists() and (not out.is_dir() or not all(_of_a_start(entry.name) for entry in out.iterdir())):
        raise RequestError("out", out, "exists and is no run folder; choose another one")
    return False


def _of_a_start(name: str) -> bool:
    """Tell whether a run that was killed as soon as it began may have left this name."""
    return name == LOCK or name.endswith(PARTIAL)


def base_source(run_info: Mapping[str, Any]) -> str:
    """Return a run's base model; one that was named by a relative path is looked for where the run began."""
    source = str(run_info["base"]["source"])
    there = Path(run_info["base"].get("folder", "")) / source
    return str(there) if is_there(there) else source


def read_run(folder: str | os.PathLike[str], file: str = RUN_FILE) -> dict[str, Any]:
    """Return what a complete run's file says; raises RequestError when the folder holds none."""
    if not complete(Path(folder), file):
        raise RequestError("run", os.fspath(folder), f"holds no complete run (no {file})")
    try:
        run_info = read_json(Path(folder) / file)
        _RECORDS[file].validate_python(run_info)
    except ValidationError as problem:
        where = ".".join(map(str, problem.errors()[0]["loc"]))
        raise RequestError("run", os.fspath(folder), f"{file} is damaged: {where} is missing or wrong") from None
    except ValueError as problem:
        raise RequestError("run", os.fspath(folder), f"{file} is damaged: {problem}") from None
    if not isinstance(run_info, dict):
        raise RequestError("run", os.fspath(folder), f"{file} is damaged: it holds no mapping")
    return run_info


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON."""
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def weights_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a pipeline's files of weights, by their names in its folder."""
    files = sorted(file for file in folder.rglob("*.safetensors") if file.is_file())
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def versions() -> dict[str, str]:
    """Return the versions of everything that bears on the result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("erase-concept", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
