"""The two ways to fail: the request is wrong (exit code 2), or the work went wrong (exit code 1)."""

from __future__ import annotations


class RequestError(ValueError):
    """The request itself is wrong. Says which argument, which value, and what is allowed, in one line."""

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        """Keep the three parts and join them to one line."""
        self.argument, self.value, self.allowed = argument, value, allowed
        super().__init__(" ".join(f"{argument} {value}: {allowed}".split()))


class EraseError(RuntimeError):
    """The work could not be finished: a diverging training, a full disk, a result that fails its check."""
