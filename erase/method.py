"""The table of erasure methods. A method is a function in a file of its own under ``methods/``, and one decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from erase_concept.training.loop import Record, TargetProgress


class Run(Protocol):
    """What a method is: it changes the model's weights in place and yields a record for each step."""

    def __call__(
        self, model: Any, data: Any, mask: Any, config: Any, *, seed: int, checkpoint: Any = None
    ) -> Iterator[Record | TargetProgress]:
        """Run the method."""


@dataclass(frozen=True)
class Method:
    """A registered method: its name, its frozen config dataclass and the function.

    ``latents`` are the parts of the data that it needs beside the embedded prompts, which every method has: "forget",
    "anchor" and "retain". ``mask`` and ``scope`` are the paper's own choice of weights, for when none is asked for.
    ``tuned_setting`` is the setting that makes it erase more or less: the one that a comparison tunes.
    ``text_encoder`` tells whether it can train the token embeddings of the concept's own words instead of the UNet.
    """

    name: str
    config: Any
    run: Run
    latents: tuple[str, ...]
    mask: str
    scope: str
    tuned_setting: str
    text_encoder: bool

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


_METHODS: dict[str, Method] = {}
_F = TypeVar("_F", bound=Callable[..., Iterator[Record | TargetProgress]])


def method(
    name: str,
    config: Any,
    *,
    latents: tuple[str, ...] = ("forget", "retain"),
    mask: str = "none",
    scope: str = "full",
    tuned_setting: str = "lr",
    text_encoder: bool = False,
) -> Callable[[_F], _F]:
    """Register the decorated function as an erasure method; ``Method`` says what the arguments are."""
    if tuned_setting not in config.__dataclass_fields__:
        raise ValueError(f"{name} has no setting {tuned_setting!r}")

    def register(function: _F) -> _F:
        _METHODS[name] = Method(name, config, function, latents, mask, scope, tuned_setting, text_encoder)
        return function

    return register


def methods() -> dict[str, Method]:
    """Return all methods by name, importing every file of ``erase_concept.methods``."""
    package = importlib.import_module("erase_concept.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"erase_concept.methods.{module.name}")
    return dict(sorted(_METHODS.items()))
