"""Safetensors files: those of strangers opened within limits, and one's own written so that a kill leaves nothing.

The library itself refuses offsets that overlap, leave gaps or lie outside the file, and sizes that do not fit them. It
takes the last of two tensors of one name, and as many names as the header holds.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from erase_concept.files import parse_json, regular_size

_MOST_HEADER = 16 << 20  # bytes; that of SD XL has 0.4 million, and a training's notes may be some millions
_MOST_TENSORS = 100_000  # SD XL with averaged weights has 5,000
_MOST_SIDES = 16


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file for PyTorch on the CPU, without reading its tensors.

    Raises ValueError, in one line, for a file that is missing, damaged, or has a name twice or too many of them.
    """
    if regular_size(file) < 8:
        raise ValueError("is too short for a safetensors file")
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _MOST_HEADER:
            raise ValueError(f"its header is too large: {size:,} bytes, and at most {_MOST_HEADER:,} are read")
        header = stream.read(size)
    if (count := header.count(b'"data_offsets"')) > _MOST_TENSORS:
        raise ValueError(f"its header names {count:,} tensors, and at most {_MOST_TENSORS:,} are read")
    try:
        parse_json(header.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("its header is no text in UTF-8") from None
    except ValueError as problem:
        raise ValueError(f"its header {problem}") from None
    try:
        opened = safe_open(file, "pt")
    except (OSError, SafetensorError) as problem:
        raise ValueError(str(problem)) from None
    with opened as stored:
        yield stored


def save_tensors(tensors: Mapping[str, Any], partial: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of PyTorch, or arrays of NumPy, as safetensors to the path that ``atomic_write`` gave.

    The library writes a hidden file beside the one that it is asked for, and renames it. That is done in a folder of
    its own here, which the next one empties: a kill would leave the hidden file for ever, as large as a model.
    """
    arrays = all(isinstance(value, np.ndarray) for value in tensors.values())
    library = import_module("safetensors.numpy" if arrays else "safetensors.torch")  # torch is not loaded for a report
    folder = partial.with_name(partial.name + ".folder")
    if folder.is_symlink():  # it might lead to a folder elsewhere
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        library.save_file(dict(tensors), folder / partial.name, metadata and dict(metadata))
        (folder / partial.name).replace(partial)
    except OSError as problem:
        problem.filename = None  # ``atomic_write`` names the file
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters by name, as a file's metadata hold them in JSON; raises ValueError for others."""
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("its shapes are no mapping")
    for name, shape in found.items():
        sides: list[Any] = shape if isinstance(shape, list) and len(shape) <= _MOST_SIDES else [None]
        whole = all(type(side) is int and side >= 0 for side in sides)
        if not whole or math.prod(max(side, 1) for side in sides) >= 1 << 48:  # torch multiplies beside a 0, too
            raise ValueError(f"{name} has no shape")
    return {name: tuple(shape) for name, shape in found.items()}
