"""Let a step end before Ctrl-C, SIGTERM or the end of the terminal (SIGHUP) stops the work."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from erase_concept.pipelines.processes import main_process

# What ends the program with cleaning up, beside Ctrl-C. Windows has no SIGHUP.
ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
HELD_BACK = (signal.SIGINT, *ENDS)


@dataclass
class _State:
    """How many contexts hold signals back, which signal waits for their end, and what handled it before."""

    contexts: int = 0
    waiting: int | None = None
    handlers: dict[int, Any] = field(default_factory=dict)


_state = _State()


@contextmanager
def finish_first() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back until the context ends; a second one acts at once.

    Yields a function that tells whether one waits, for loops that leave early then. Only the main thread gets signals:
    in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    _begin()
    try:
        yield lambda: _state.waiting is not None
    finally:
        _end()


def _begin() -> None:
    _state.contexts += 1
    if _state.contexts > 1:
        return
    for number in HELD_BACK:
        before = signal.getsignal(number)
        if before not in (None, signal.SIG_IGN):  # handled outside of Python, or not at all, as with nohup
            _state.handlers[number] = before
            signal.signal(number, _received)


def _end() -> None:
    _state.contexts -= 1
    if _state.contexts:
        return
    waiting, _state.waiting = _state.waiting, None
    _restore()
    if waiting is not None:
        signal.raise_signal(waiting)


def _received(number: int, _: FrameType | None) -> None:
    if _state.waiting is not None:
        _restore()
        signal.raise_signal(number)
        return
    _state.waiting = number
    if main_process():
        say("the step is finished first; once more stops at once")


def _restore() -> None:
    for number, before in _state.handlers.items():
        signal.signal(number, before)
    _state.handlers.clear()


def say(line: str) -> None:
    """Print a line on stderr, if anybody is there to read it: the terminal or the other end of a pipe may be gone."""
    with suppress(OSError, ValueError):
        # At once with its end: where Python does not buffer, another process could write between the two.
        print(f"erase-concept: {line}\n", end="", file=sys.stderr)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does, cleaning up, with SystemExit and the exit code 143 or 129.

    What is ignored, as SIGHUP is with nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDS}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
