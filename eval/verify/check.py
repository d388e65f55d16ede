"""What a check is: one thing that was looked at, whether it holds, and what was found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``holds`` is None where it could not be looked at; ``found`` then says why.

    ``file`` is the file at fault where it does not hold, by its path from the certificate's folder.
    """

    what: str
    holds: bool | None
    found: str
    file: str = ""


def failed(what: str, file: str, found: str) -> Check:
    """Return a check that does not hold, because of a file."""
    return Check(what, False, found, file)
