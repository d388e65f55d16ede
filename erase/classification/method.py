"""What a method for classifiers is: one function in a file of its own, with a decorator that carries its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from erase_concept.classification.training import Events
from erase_concept.registry import Registry


class Run(Protocol):
    """A method's function: it changes a classifier's weights in place and yields a record for each step."""

    def __call__(self, model: Any, data: Any, mask: Any, settings: Any, *, seed: int, checkpoint: Any = None) -> Events:
        """Run the method."""


@dataclass(frozen=True)
class Unlearner:
    """A method's record.

    ``summary`` says in one line what it does, ``paper`` where it was published. ``mask`` is the paper's own choice of
    weights. ``tuned_setting`` is the setting that makes it forget more or less. ``new_weights`` says that it needs a
    network of new weights beside the classifier, ``anew`` that it begins with them and needs none of the classifier's,
    and ``linear_head`` that the classifier's last layer must be linear. ``gradients`` returns how many images a method
    without epochs takes the gradients of, for its settings and so many images to forget and to retain.
    """

    name: str
    settings: Any  # its class of settings
    run: Run
    summary: str
    title: str
    paper: str
    mask: str = "none"
    tuned_setting: str = "lr"
    new_weights: bool = False
    anew: bool = False
    linear_head: bool = False
    gradients: Callable[[Any, int, int], int] | None = None


UNLEARNERS: Registry[Unlearner] = Registry("unlearners", "method")
_F = TypeVar("_F", bound=Callable[..., Events])


def unlearner(name: str, settings: Any, **about: Any) -> Callable[[_F], _F]:
    """Register the decorated function as a method for classifiers; ``about`` are the other fields of ``Unlearner``.

    Raises ValueError when the settings lack the tuned one, TypeError for a field that a record does not have.
    """

    def register(function: _F) -> _F:
        record = Unlearner(name, settings, function, **about)
        if record.tuned_setting not in {field.name for field in fields(settings)}:
            raise ValueError(f"{name} has no setting {record.tuned_setting!r}")
        UNLEARNERS.add(record)
        return function

    return register
