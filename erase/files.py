"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from erase_concept.errors import EraseError


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Give a temporary path beside ``file``, which becomes ``file`` if all goes well and is removed if it does not.

    Makes the parent folder. The file may be read by whom the user's umask says, which safetensors would not ask. Raises
    EraseError when safetensors cannot write (a full disk, say).
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        os.umask(umask := os.umask(0o077))  # it can be read only by setting it
        partial.chmod(0o666 & ~umask)
        partial.replace(file)
    except SafetensorError as problem:
        raise EraseError(f"{file} could not be written: {problem}") from None
    finally:
        partial.unlink(missing_ok=True)
