"""The two ways to fail: the request is wrong (exit code 2), or the work went wrong (exit code 1)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

_SHOWN = 1000  # characters of each part of a message


class RequestError(ValueError):
    """The request itself is wrong. Says which setting, which value, and what is allowed, in one line."""

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        """Keep the three parts, which are also all that goes from one process to another."""
        self.setting, self.value, self.allowed = setting, value, allowed
        super().__init__(setting, value, allowed)

    def __str__(self) -> str:
        """Join the three parts to one line; of a long one it has the beginning."""
        setting, value, allowed = (_shortened(str(part)) for part in (self.setting, self.value, self.allowed))
        return one_line(f"{setting} {value}: {allowed}")


class EraseError(RuntimeError):
    """The work could not be finished: a diverging training, a full disk, a result that fails its check."""

    def __init__(self, *parts: object, of_all: bool = False) -> None:
        """Keep the message, and whether all processes of a run raise it alike, so that one can speak for the others."""
        super().__init__(*parts)
        self.of_all = of_all


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(text: str) -> str:
    """Return a text in one line, with what a terminal would obey, such as an escape sequence, written out."""
    joined = " ".join(text.split())
    if joined.isascii() and joined.isprintable():
        return joined
    hidden = (unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in joined)
    return "".join(ascii(c)[1:-1] if bad else c for c, bad in zip(joined, hidden, strict=True))


def out_of_memory(problem: BaseException | None) -> bool:
    """Tell whether an error, or what led to it, says that there was too little memory, on the machine or a device."""
    while problem is not None:
        if isinstance(problem, MemoryError) or re.search("allocate memory|out of memory", str(problem)):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def first_line(problem: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:_SHOWN]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...? " with the known name that is nearest, or an empty text where none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""
