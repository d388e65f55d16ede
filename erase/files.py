"""Files: written whole or not at all, read within limits, and told for what they are.

A file may come from a stranger. What reads one raises ValueError, in one line, for what it refuses; whoever calls it
knows the setting that named the file. Plain data are mappings with texts as keys, lists, texts, finite numbers, true,
false and null. The limits keep a file from taking a gigabyte of memory or seconds of time.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from safetensors import SafetensorError

from erase_concept.errors import EraseError, RequestError

if sys.platform == "win32":
    from filelock import FileLock
else:
    import fcntl

LOCK = ".lock"  # held by the process that works in a folder
PARTIAL = ".partial"  # how the name of a file ends that is not whole yet
MOST_BYTES = 64 << 20  # of a text; a report of 100,000 pairs has some 50 MB
_MOST_VALUES = 2_500_000  # of JSON, counted by its brackets and commas
_MOST_NODES = 100_000  # of YAML, whose parser is slower
_DEEPEST = 64  # levels of nesting
_TEXT = frozenset((str,))
_PLAIN = frozenset((dict, list, str, int, float, bool, type(None)))
_SURROGATE = re.compile(r"\\[uU](?:0000)?[dD][89a-fA-F]")
_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where PyYAML has it
_MOST_DIGITS = 100  # of a whole number; a tokenizer without a limit says 10^30
_NO_LOCKS = "erase-concept: %s lies on a file system without locks: start no other command in it"
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # a file system that has no such thing


@contextmanager
def atomic_write(file: Path, *, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``file``, which becomes ``file`` if all goes well and is removed if it does not.

    Makes the parent folder. The file may be read by whom the user's umask says, which safetensors would not ask. What a
    killed process left is written over; where another process is writing the same file, its end is waited for. A link
    of either name is replaced and not followed.

    The file is on the disk before it gets its name, so that it outlives a power cut. That takes some milliseconds;
    without ``sync`` it may be lost or damaged then, which is for files that are temporary, or read with a checksum.

    Raises OSError with the file's name when it cannot be written (a full disk, say).
    """
    partial = file.with_name(file.name + PARTIAL)
    if partial.is_symlink():  # it might lead to a file elsewhere
        partial.unlink()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(partial):
            try:
                yield partial
                os.umask(umask := os.umask(0o077))  # it can be read only by setting it
                partial.chmod(0o666 & ~umask)
                if sync:
                    to_disk(partial)
                partial.replace(file)
                if sync:
                    to_disk(file.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except SafetensorError as problem:
        raise write_error(problem, file) from None
    except OSError as problem:
        if problem.filename in (None, os.fspath(partial)):
            problem.filename = os.fspath(file)
        raise


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk. Windows is not asked for this.

    Raises OSError when it cannot be written: a network folder may say only now that it is full.
    """
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder in which one may write and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in _CANNOT:
            raise OSError(problem.errno, problem.strerror, os.fspath(path)) from None
    finally:
        os.close(descriptor)


def write_error(problem: SafetensorError, file: Path) -> OSError | EraseError:
    """Return the error of the system for which safetensors could not write a file, or else what safetensors says."""
    # The second is how its first versions say it.
    if found := re.search(r"\(os error (\d+)\)|\bcode: (\d+)", str(problem)):
        number = int(found[1] or found[2])
        return OSError(number, os.strerror(number), os.fspath(file))
    return EraseError(f"{file} could not be written: {problem}")


@contextmanager
def _only_writer(partial: Path) -> Iterator[None]:
    """Hold a file that is not whole yet; it is made where there is none."""
    # On Windows a file that another process has open cannot be replaced anyway.
    descriptor = None if sys.platform == "win32" else _held(partial)[0]
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _held(file: Path, *, wait: bool = True) -> tuple[int, bool]:
    """Open a file and hold it, when no other process holds it any more.

    Returns its descriptor, and whether the file system has locks. Raises BlockingIOError where another process holds
    the file and its end is not waited for.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            has_locks = _hold(descriptor, wait=wait)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor, has_locks
        except FileNotFoundError:  # the other process has removed it, or given it another name
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _hold(descriptor: int, *, wait: bool = True) -> bool:
    """Hold an open file until it is closed, when no other process holds it; False where there are no such locks.

    Some network folders have none. Raises BlockingIOError as ``_held`` does.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as problem:
        if problem.errno == errno.EACCES:  # as some file systems say it
            raise BlockingIOError(*problem.args) from None
        return False
    return True


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Add lines to a file, and end a last line before that a kill cut short. Makes the parent folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        _hold(stream.fileno())
        cut = False
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            cut = stream.read() != b"\n"
        stream.write(("\n" * cut + "".join(lines)).encode())


@contextmanager
def only_process(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder; where another process holds it, wait for its end or raise RequestError.

    Where the file system has no locks, as that of some network folders, a warning says so.
    """
    with ExitStack() as until_the_end:
        try:
            if sys.platform == "win32":
                until_the_end.enter_context(FileLock(folder / LOCK, timeout=-1 if wait else 0))
            else:
                descriptor, has_locks = _held(folder / LOCK, wait=wait)
                until_the_end.callback(os.close, descriptor)
                if not has_locks:
                    logging.getLogger("erase_concept").warning(_NO_LOCKS, folder)
        except (BlockingIOError, TimeoutError):  # the second is filelock's
            raise RequestError("out", folder, "another process is at work in it: wait for its end") from None
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no file that is open
                (folder / LOCK).unlink()


def mistaken_for(file: Path) -> str:
    """Say what a file is where a download brought something else: a Git LFS pointer or an HTML page; otherwise ""."""
    try:
        regular_size(file)
        with file.open("rb") as stream:
            start = stream.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except (OSError, ValueError):
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


def is_there(path: str | Path) -> bool:
    """Tell whether there is a file or folder of this path; a text that can be no path names none."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def regular_size(file: Path) -> int:
    """Return the size of a regular file in bytes; to open anything else, such as a pipe, could block for ever."""
    try:
        found = file.stat()
    except OSError as problem:
        raise ValueError(problem.strerror or "cannot be read") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("Is a directory" if stat.S_ISDIR(found.st_mode) else "is no regular file")
    return found.st_size


def read_text(file: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a file in UTF-8, without a byte order mark."""
    if regular_size(file) > most:
        raise ValueError(f"is larger than {most >> 20} MiB")
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise ValueError(problem.strerror or "cannot be read") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"is no text in UTF-8: {problem.reason} at byte {problem.start}") from None


def read_lines(file: Path, most: int = MOST_BYTES) -> list[str]:
    """Return the lines of a text that grows by them, each with its end; none where there is no file.

    Raises RequestError, since such a file is named by the folder that it is in.
    """
    try:
        # Not ``splitlines``, which also splits at characters that JSON leaves in a text, such as U+2028.
        return io.StringIO(read_text(file, most)).readlines() if file.exists() else []
    except ValueError as problem:
        raise RequestError("file", file, str(problem)) from None


def read_json(file: Path, *, half_characters: bool = False) -> Any:
    """Return the value of a JSON file, as ``parse_json`` does."""
    return parse_json(read_text(file), half_characters=half_characters)


def parse_json(text: str, *, half_characters: bool = False, most: int = _MOST_VALUES) -> Any:
    """Return the value of a JSON text. It may have no key twice and no number that is not finite.

    ``half_characters`` allows halves of surrogate pairs, which no file in UTF-8 can hold but as escapes. ``most`` is
    how many values it may have.
    """
    if text.count("{") + text.count("[") + text.count(",") > most:
        raise ValueError(f"not JSON of at most {most:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"is nested deeper than {_DEEPEST} levels") from None
    except ValueError as problem:
        raise ValueError(f"not JSON: {problem}") from None
    _check_plain(value, "" if half_characters else text)
    return value


def read_yaml(file: Path) -> Any:
    """Return the value of a YAML file."""
    return parse_yaml(read_text(file))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. It may have no key twice, no alias and no tag that makes other than plain data.

    Aliases are refused because a few of them, one within the other, stand for billions of values.
    """
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - _UniqueKeys is a SafeLoader
    except yaml.YAMLError as problem:
        raise ValueError(f"not YAML: {problem}") from None
    except ValueError:
        raise
    except Exception as problem:  # PyYAML's constructors raise whatever a tag such as !!bool leads them to
        raise ValueError(f"not YAML: {type(problem).__name__} in a value's tag") from None
    _check_plain(value, text)
    return value


class _UniqueKeys(_SAFE):
    """The safe loader, which by itself would take the last of two values with one key."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Return a mapping; raises ConstructorError for a key that is there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: Any) -> Any:
        """Return a whole number; of a long one in base 60, such as 1:30:00, it would take the square of its length."""
        if len(self.construct_scalar(node)) > _MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
        return self.construct_yaml_int(node)


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_whole)


def _check_events(text: str) -> None:
    """Raise ValueError for aliases and for too many or too deep values, before any of them is made."""
    depth = 0
    for place, event in enumerate(yaml.parse(text, Loader=_SAFE)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"has the alias *{event.anchor}: write out what it stands for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"is nested deeper than {_DEEPEST} levels")
        if place > _MOST_NODES:
            raise ValueError(f"has more than {_MOST_NODES:,} values")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _check_plain(value: Any, text: str) -> None:
    """Raise ValueError for what is not plain data, or nested too deeply; ``text`` is what the value was read from."""
    if _SURROGATE.search(text):  # such an escape, or the half of one
        try:
            json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
        except UnicodeEncodeError:
            raise ValueError("has half a character (a surrogate) in a text") from None
    depth = 0
    level: list[Any] = [[value]]
    while level:
        depth += 1
        if depth > _DEEPEST + 1:
            raise ValueError(f"is nested deeper than {_DEEPEST} levels")
        if not all(_TEXT.issuperset(map(type, one)) for one in level if isinstance(one, dict)):
            raise ValueError("has a key that is no text: put it in quotes")
        below = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        kinds = set(map(type, below))
        if strange := kinds - _PLAIN:
            raise ValueError(f"has a {strange.pop().__name__} in the place of a text: put it in quotes")
        if float in kinds and not all(math.isfinite(one) for one in below if isinstance(one, float)):
            raise ValueError("has a number that is NaN or infinite")
        if int in kinds and max(abs(one) for one in below if isinstance(one, int)) >= 10**_MOST_DIGITS:
            raise ValueError(f"has a number of more than {_MOST_DIGITS} digits")
        level = [one for one in below if isinstance(one, dict | list)]
