"""What no reader may do with any file: raise anything but our errors, hang, take memory, write elsewhere, run anything.

Python's audit events tell what is opened for writing, removed or started. A module of the name ``fuzz_canary``, which
hostile files ask for, tells whether it was imported.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erase_concept.errors import EraseError, RequestError

SECONDS = 5.0  # of the processor's time; a reader that waits for something gets WAITED
WAITED = 60.0
MEMORY = 1 << 30  # bytes above the file's own
CANARY = "fuzz_canary"
_STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen", "pty.spawn"}
_STARTS |= {"socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open"}
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_CHANGES |= {"shutil.rmtree", "shutil.move", "shutil.copyfile"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """Raised after too long; no ``except Exception`` holds it up."""


@dataclass
class _Watch:
    """What is seen while a reader works: it may write into ``folder`` alone."""

    folder: Path
    seen: list[str] = field(default_factory=list)

    def may_write(self, path: object) -> bool:
        if isinstance(path, int):  # a file that is open already
            return True
        file = Path(os.fsdecode(path))
        return (file.parent.resolve() / file.name).is_relative_to(self.folder) or str(file) == os.devnull


_watch: _Watch | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    watch = _watch
    if watch is None:
        return
    if event == "open":
        path, _, flags = args
        bad = isinstance(flags, int) and flags & _WRITING and not watch.may_write(path)
    elif event == "import":
        bad = args[0] == CANARY
    else:
        bad = event in _STARTS or (event in _CHANGES and not watch.may_write(args[0]))
    if bad:
        watch.seen.append(f"{event} {args[:2]}")
        raise PermissionError(f"{event} is watched")


sys.addaudithook(_audit)


@contextmanager
def _alarm(seconds: float, waited: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, waited))
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, after in timers:
        signal.setitimer(timer, after)
    try:
        yield
    finally:
        for (number, timer, _), old in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, old)


def broken_by(read: Callable[[Path], object], file: Path) -> str:
    """Return what a reader did wrong with a file; an empty text when it read or refused it as it must."""
    global _watch
    size, before = file.stat().st_size, _memory()
    peak, start = _peak(), time.process_time()
    _watch = watch = _Watch(file.parent.resolve())
    problem = ""
    try:
        with _alarm(SECONDS, WAITED):
            read(file)
    except (RequestError, EraseError) as refusal:
        problem = _fault_of(str(refusal))
    except Hang:
        problem = f"hangs: more than {SECONDS:g} s"
    except Exception as escaped:
        last = traceback.extract_tb(escaped.__traceback__)[-1]
        problem = f"raises {type(escaped).__name__} at {Path(last.filename).name}:{last.lineno}: {str(escaped)[:200]}"
    finally:
        _watch = None
    if watch.seen:
        return f"touches what it must not: {watch.seen[0]}"
    if (now := _peak()) > peak and now - before > MEMORY + size:
        return f"takes {(now - before) >> 20} MiB for a file of {size} bytes"
    if not problem and (took := time.process_time() - start) > SECONDS:
        return f"takes {took:.1f} s"
    return problem


def _fault_of(message: str) -> str:
    """Say what is wrong with a message, if anything: it must be one line, without what a terminal would obey."""
    if "\n" in message or "\x1b" in message or not 0 < len(message) < 4000:
        return f"refuses in no plain line: {message[:200]!r}"
    if "too little memory" in message:
        return f"asks for more memory than there is: {message[:200]}"
    return ""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def limited_memory(more: int = 4 << 30) -> Iterator[None]:
    """Let this process map at most so many bytes more than it does: a reader that asks for all memory gets an error."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
