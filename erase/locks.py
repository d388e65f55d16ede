"""Locks: a folder in which one process works, and a file that one process writes."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from erase_concept.errors import RequestError

if sys.platform == "win32":
    from filelock import FileLock
else:
    import fcntl

LOCK = ".lock"  # held by the process that works in a folder
_NO_LOCKS = "erase-concept: %s lies on a file system without locks: start no other command in it"


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
                descriptor, has_locks = hold_file(folder / LOCK, wait=wait)
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


def hold_file(file: Path, *, wait: bool = True) -> tuple[int, bool]:
    """Open a file and hold it, when no other process holds it any more.

    Returns its descriptor, and whether the file system has locks. Raises BlockingIOError where another process holds
    the file and its end is not waited for.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            has_locks = hold(descriptor, wait=wait)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor, has_locks
        except FileNotFoundError:  # the other process has removed it, or given it another name
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def hold(descriptor: int, *, wait: bool = True) -> bool:
    """Hold an open file until it is closed, when no other process holds it; False where there are no such locks.

    Some network folders have none. Raises BlockingIOError as ``hold_file`` does.
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
