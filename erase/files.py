"""Writing files whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from erase_concept.errors import EraseError


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give a temporary path beside ``file``, which becomes ``file`` if all goes well and is removed if it does not.

    Makes the parent folder. Raises EraseError when safetensors cannot write (a full disk, say).
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        partial.replace(file)
    except SafetensorError as problem:
        raise EraseError(f"{file} could not be written: {problem}") from None
    finally:
        partial.unlink(missing_ok=True)
