"""Checkpoints of a training: the last two, each with the checksum of what it holds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase_concept.errors import RequestError, one_line
from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.processes import main_process
from erase_concept.run_folder import versions
from erase_concept.training.optimizer import MaskedOptimizer

_LOG = logging.getLogger("erase_concept")
PREVIOUS = ".previous"  # how the name of the checkpoint before the last ends


def save_checkpoint(file: Path, tensors: Mapping[str, Tensor], step: int, processes: int = 1) -> None:
    """Write the tensors after so many steps of so many processes; the checkpoint of before is kept beside it.

    Steps draw from generators of their own, so their number is all that a training needs beside its tensors.
    """
    saved = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(file) as partial:
        about = {"step": str(step), "processes": str(processes), "sha256": _sha256(saved, step), "made_with": _ours()}
        save_tensors(saved, partial, about)
        if file.exists():
            file.replace(previous(file))


def previous(file: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return file.with_name(file.name + PREVIOUS)


def steps_done(file: Path | None) -> int:
    """Return how many steps the newest sound checkpoint has behind it: none where there is no such file."""
    found = None if file is None else _newest(file)
    return 0 if found is None else found.step


def processes_of(file: Path) -> int:
    """Return how many processes took the steps of the newest sound checkpoint; 1 where there is no such file."""
    found = _newest(file)
    return 1 if found is None else found.processes


def steps_in(folder: Path) -> int:
    """Return how many steps all trainings of a folder have behind them."""
    names = {file.name.removesuffix(PREVIOUS) for file in folder.glob("*.safetensors*")}
    return sum(steps_done(folder / name) for name in names if name.endswith(".safetensors"))


def restore(optimizer: MaskedOptimizer, file: Path) -> None:
    """Put the newest sound checkpoint back; raises RequestError where it is another training's."""
    try:
        optimizer.restore(read_checkpoint(file))
    except ValueError as problem:
        allowed = f"is the checkpoint of another training: {one_line(str(problem))}; delete it to train from the start"
        raise RequestError("checkpoint", file, allowed) from None


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Return the tensors of the newest sound checkpoint, and drop a damaged one, so that it is never the one before.

    A warning tells where it was written with other versions of the libraries.
    """
    found = _newest(file)
    if found is None:
        raise FileNotFoundError(f"no sound checkpoint {file}")
    if found.made_with != _ours() and main_process():
        what = "%s was written with %s, and this is %s: the result will not have the bits of an uninterrupted run"
        _LOG.warning(f"erase-concept: {what}", found.file, found.made_with, _ours())
    if found.file != file:
        file.unlink(missing_ok=True)
    with safe_open(found.file, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}


@dataclass(frozen=True)
class _Checkpoint:
    file: Path
    step: int
    processes: int
    made_with: str


def _newest(file: Path) -> _Checkpoint | None:
    for one in (file, previous(file)):
        if one.is_file():
            about = one.stat()
            if (found := _checked(one, about.st_size, about.st_mtime_ns)) is not None:
                return found
    return None


@lru_cache(maxsize=8)
def _checked(file: Path, size: int, changed: int) -> _Checkpoint | None:
    """Return what a checkpoint of this size and time says of itself; None, with a warning, where it is damaged."""
    try:
        with safe_open(file, "pt") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        step, processes = int(about["step"]), int(about.get("processes", "1"))
        if step > 0 and processes > 0 and _sha256(tensors, step) == about["sha256"]:
            return _Checkpoint(file, step, processes, one_line(about.get("made_with", _ours())))
        problem = "its checksum is another one"
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        problem = one_line(str(error)) or type(error).__name__  # it may quote the file
    _LOG.warning("erase-concept: %s is damaged and not used: %s", file, problem)
    return None


def _ours() -> str:
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def _sha256(tensors: Mapping[str, Tensor], step: int) -> str:
    """Return the SHA-256 over the step and over the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(f"{step}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
