"""What a method is: one function in a file of its own under ``methods/``, with a decorator that carries its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from erase_concept.registry import Registry
from erase_concept.seed import stage_seed
from erase_concept.training.loop import Record, TargetProgress, Training

Events = Iterator[Record | TargetProgress]


class Run(Protocol):
    """A method's function: it changes the model's weights in place and yields a record for each step."""

    def __call__(self, model: Any, data: Any, mask: Any, settings: Any, *, seed: int, checkpoint: Any = None) -> Events:
        """Run the method."""


@dataclass(frozen=True)
class Phase:
    """A moment of a method at which its memory may be highest: what it holds beside the model's weights.

    ``frozen`` and ``trained`` are the rows of the passes through the UNet without and with gradient. ``sampled`` are
    rows of more passes without gradient, which take time alone: where a step samples. ``copies`` counts copies of all
    of the UNet's weights. ``gradients`` counts whole gradients, or other copies of the weights that may change; 0 says
    that every gradient is used and dropped during the backward pass. ``adapted`` tells of a weight's name whether it
    has a rank-one adapter, where these are trained in the place of the weights. ``optimizer`` tells whether the
    optimizer's state is there already.
    """

    frozen: int = 0
    trained: int = 0
    sampled: int = 0
    copies: float = 0.0
    gradients: float = 0.0
    adapted: Callable[[str], bool] | None = None
    optimizer: bool = True


def _salun_memory(settings: Any) -> tuple[Phase, ...]:
    return (Phase(frozen=settings.batch_size, trained=2 * settings.batch_size),)


def _accept(recipe: Any) -> None:
    """Accept every recipe."""


@dataclass(frozen=True)
class Method:
    """A method's record.

    ``summary`` says in one line what it does. ``trains`` names the weights that it changes by itself, ``paper`` where
    it was published. ``mask`` and ``scope`` are the paper's own choice of weights, for when none is asked for.
    ``latents`` are the parts of the data that it learns from: "forget", "anchor" and "retain". Every method has the
    embedded prompts beside them.
    ``tuned_setting`` is the setting that makes it erase more or less: the one that a comparison tunes.
    ``text_encoder`` tells whether it can train the token embeddings of the concept's own words instead of the UNet.
    ``check`` raises RequestError for a recipe that the method cannot follow, before anything is sampled.
    ``bf16_weights`` tells whether the UNet's weights may be bf16 while it learns: where nothing but the masked update,
    which rounds at random, changes them.
    ``sharded`` tells whether the UNet's weights may be in shards (FSDP2) while it learns: where the method looks at no
    weight itself, and makes as many passes through the UNet on every process.
    ``memory`` returns for its settings the moments at which it holds most. By default a step makes one pass on the
    forget rows without gradient, and one on forget and retain rows with it. A closed form has none.
    """

    name: str
    settings: Any  # its class of settings
    run: Run
    summary: str
    title: str
    paper: str
    trains: str = "all of the UNet"
    latents: tuple[str, ...] = ("forget", "retain")
    mask: str = "none"
    scope: str = "full"
    tuned_setting: str = "lr"
    text_encoder: bool = False
    bf16_weights: bool = False
    sharded: bool = False
    memory: Callable[[Any], tuple[Phase, ...]] = _salun_memory
    check: Callable[[Any], None] = _accept

    @property
    def needs(self) -> str:
        """What it learns from: "images" (made by the model, or given), or "prompts" alone."""
        return "images" if self.latents else "prompts"

    @property
    def needs_anchor_rows(self) -> bool:
        """Whether it learns from pictures of the anchor and has no pictures of the concept in their place."""
        return "anchor" in self.latents and "forget" not in self.latents

    def epoch_rows(self, data: Any) -> int:
        """Return the rows of an epoch: those of the forget loss, or for a method without one those that are retained.

        ``data`` is a ``ForgetRetain``. A mask's forget rows do not count where the method learns from none.
        """
        parts = [part for part in self.latents if part != "retain"] or ["retain"]
        return sum(len(getattr(data, f"{part}_latents")) for part in parts)

    def resolved(self, settings: Any, data: Any) -> Any:
        """Return the settings with steps in the place of epochs, for the rows that there are."""
        return settings.resolved(self.epoch_rows(data)) if isinstance(settings, Training) else settings

    def start(self, model: Any, data: Any, mask: Any, settings: Any, *, seed: int, checkpoint: Any = None) -> Events:
        """Run it with the seed of a run."""
        settings = self.resolved(settings, data)
        return self.run(model, data, mask, settings, seed=method_seed(seed), checkpoint=checkpoint)


METHODS: Registry[Method] = Registry("methods", "method")
_F = TypeVar("_F", bound=Callable[..., Events])


def method(name: str, settings: Any, **about: Any) -> Callable[[_F], _F]:
    """Register the decorated function as a method; ``about`` are the other fields of ``Method``.

    Raises ValueError when the settings lack the tuned one, TypeError for a field that a record does not have.
    """

    def register(function: _F) -> _F:
        record = Method(name, settings, function, **about)
        if record.tuned_setting not in {field.name for field in fields(settings)}:
            raise ValueError(f"{name} has no setting {record.tuned_setting!r}")
        METHODS.add(record)
        return function

    return register


def method_seed(seed: int) -> int:
    """Return the seed of a run's training, derived from the run's.

    It is the same for every method, so that compared methods draw the same rows, noise and time steps. The words that
    it is derived by must never change: every erased model would have other weights.
    """
    return stage_seed(seed, "method", "salun")
