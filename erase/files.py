"""Writing files whole or not at all, by one process at a time, and telling what a file is that it should not be."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from erase_concept.errors import EraseError, RequestError

try:
    import fcntl
except ImportError:  # Windows, where a file that another process has open cannot be replaced
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # held by the process that works in a folder
PARTIAL = ".partial"  # how the name of a file ends that is not whole yet


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Give a temporary path beside ``file``, which becomes ``file`` if all goes well and is removed if it does not.

    Makes the parent folder. The file may be read by whom the user's umask says, which safetensors would not ask. What a
    killed process left is written over; where another process is writing the same file, its end is waited for.

    Raises OSError with the file's name when it cannot be written (a full disk, say).
    """
    partial = file.with_name(file.name + PARTIAL)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(partial):
            try:
                yield partial
                os.umask(umask := os.umask(0o077))  # it can be read only by setting it
                partial.chmod(0o666 & ~umask)
                partial.replace(file)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except SafetensorError as problem:
        raise write_error(problem, file) from None
    except OSError as problem:
        if problem.filename in (None, os.fspath(partial)):
            problem.filename = os.fspath(file)
        raise


def write_error(problem: SafetensorError, file: Path) -> OSError | EraseError:
    """Return the error of the system for which safetensors could not write a file, or else what safetensors says."""
    if number := re.search(r"\(os error (\d+)\)", str(problem)):
        return OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(file))
    return EraseError(f"{file} could not be written: {problem}")


@contextmanager
def _only_writer(partial: Path) -> Iterator[None]:
    """Hold a file that is not whole yet; it is made where there is none."""
    descriptor = None if fcntl is None else _held(partial)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _held(partial: Path) -> int:
    """Open a file and hold it, when no other process holds it any more; return its descriptor."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _wait_for(descriptor)
            if os.path.samestat(os.fstat(descriptor), partial.stat()):
                return descriptor
        except FileNotFoundError:  # the other process has given it its name
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    """Hold an open file until it is closed, when no other process holds it; some network folders have no such locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Add lines to a file, and end a last line before that a kill cut short. Makes the parent folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        _wait_for(stream.fileno())
        cut = False
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            cut = stream.read() != b"\n"
        stream.write(("\n" * cut + "".join(lines)).encode())


@contextmanager
def only_process(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder; where another process on this machine holds it, wait for its end or raise RequestError."""
    lock = FileLock(folder / LOCK, timeout=-1 if wait else 0)
    try:
        with lock:
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no file that is open
                    (folder / LOCK).unlink()
    except Timeout:
        raise RequestError("out", folder, "another process is at work in it: wait for its end") from None


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
