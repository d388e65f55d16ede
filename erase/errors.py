"""The two ways to fail: the request is wrong (exit code 2), or the work went wrong (exit code 1)."""

from __future__ import annotations


class RequestError(ValueError):
    """The request itself is wrong. Says which setting, which value, and what is allowed, in one line."""

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        """Keep the three parts, which are also all that goes from one process to another."""
        self.setting, self.value, self.allowed = setting, value, allowed
        super().__init__(setting, value, allowed)

    def __str__(self) -> str:
        """Join the three parts to one line."""
        return " ".join(f"{self.setting} {self.value}: {self.allowed}".split())


class EraseError(RuntimeError):
    """The work could not be finished: a diverging training, a full disk, a result that fails its check."""
