"""Writing files whole or not at all, and telling what a file is that is not what it should be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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


def mistaken_for(file: Path) -> str:
    """Say what a file is where a download brought something else: a Git LFS pointer or an HTML page; otherwise ""."""
    try:
        with file.open("rb") as stream:
            start = stream.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: 'git lfs pull' gets it"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is an HTML page, such as a failed download leaves: get the file again"
    return ""


def relative(file: Path, folder: Path) -> str:
    """Return the path from a folder to a file, with ``/`` between its parts on every system."""
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # on Windows there is no way from one drive to another
        return file.resolve().as_posix()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file; its first ten digits are the AutoV2 of model managers."""
    with file.open("rb") as stream:
        return stream_sha256(stream)


def stream_sha256(stream: BinaryIO) -> str:
    """Return the SHA-256 of what is left of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
