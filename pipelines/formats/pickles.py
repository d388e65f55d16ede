"""Pickles of tensors (.ckpt, .pt, .bin): read without running any code that a file asks for."""

from __future__ import annotations

import builtins
import io
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

# Modules whose functions and classes reach the machine. No checkpoint needs them.
_REFUSED = (
    *("os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "shutil", "socket", "ctypes", "pty", "code"),
    *("commands", "webbrowser", "pickle", "marshal"),
)
_LONGEST_LINE = 1000  # bytes; PyTorch takes time by the square of a class's name to refuse it
_TOO_LONG = "it holds a name that is too long"
_MOST_NAMES = 50  # for each, an older file is read once more; a training's state has some ten


class Stub:
    """Stands in for an object of any class that is no tensor, such as a callback of the training: it holds nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Stub:
        """Take what any class takes."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""

    def __setstate__(self, _: Any) -> None:
        """Keep nothing."""


def unpickle(file: Path) -> Any:
    """Return what a pickle holds on the CPU: tensors and plain values, and a Stub for any other object.

    PyTorch's restricted reader does it, which calls nothing but what rebuilds tensors. Raises UnpicklingError whose
    text has "GLOBAL name" when the file asks for a function of Python's that could do harm, and ValueError for a file
    whose parts take more memory than the file has bytes.
    """
    _check_parts(file)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # no zip file: PyTorch's older format, or no pickle at all
        names = []
    for _ in range(_MOST_NAMES):
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(_stubs(names)):
                warnings.simplefilter("ignore")  # a pickle's age
                return _load(file)
        except Exception as problem:
            name = re.search(r"Unsupported global: GLOBAL (\S+)", str(problem))
            if name is None or name[1] in names or not _is_harmless(name[1]):
                raise
            names = [*names, name[1]]
    raise ValueError("it asks for too many classes")


def _load(file: Path) -> Any:
    with file.open("rb") as stream:
        if stream.read(4) == b"PK\x03\x04":  # PyTorch's own reader of zip files is faster from a path
            return torch.load(file, map_location="cpu", weights_only=True)
    with _Bounded(io.FileIO(file)) as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


class _Bounded(io.BufferedReader):
    """Makes no room for more than is left of a file, of which a few bytes may ask for gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return so many bytes, or fewer at the end of the file."""
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return a line, such as a class's name."""
        line = super().readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise ValueError(_TOO_LONG)
        return line


def _check_parts(file: Path) -> None:
    """Raise ValueError for parts that are compressed, or told of twice, and for a class's name that is too long.

    PyTorch writes each part once and as it is. Its pickle is ``data.pkl``.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > file.stat().st_size:
                raise ValueError("its parts are larger than the file itself")
            for part in archive.infolist():
                if part.filename.endswith("data.pkl"):
                    _check_names(archive.read(part))


def _check_names(pickled: bytes) -> None:
    """Raise ValueError for a class's name that is too long, and where it is no pickle."""
    for operation, name, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and len(str(name)) > _LONGEST_LINE:
            raise ValueError(_TOO_LONG)


def check_plain_tensors(tensors: Mapping[str, torch.Tensor], most: int) -> None:
    """Raise ValueError for a tensor that is not dense or holds more than its storage, and for over ``most`` bytes.

    A pickle says itself how large a tensor and its storage are.
    """
    storages: dict[int, int] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"{name} is no dense tensor")
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():
            raise ValueError(f"{name} {list(tensor.shape)} is larger than what is stored of it")
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > most:
        raise ValueError("its tensors are larger than the file itself")


def _stubs(names: Iterable[str]) -> list[Any]:
    return [(Stub, name) for name in names if _is_harmless(name)]


def _is_harmless(name: str) -> bool:
    """Tell whether an object of this name is passed over; a stub would run nothing either way, but it says a lot."""
    module, _, own = name.rpartition(".")
    if module.partition(".")[0] in _REFUSED:
        return False
    return module not in ("", "builtins", "__builtin__") or isinstance(getattr(builtins, own, None), type)
