"""The type Guard: a way to sample that keeps a concept out of the images while no weight of the model changes.

Erasure is to be compared with guards. They erase nothing: whoever has the weights can sample without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from erase_concept.pipelines.model import Diffusion

# (noisy latents [n, 4, h, w], their time step, number of the sampling step) -> the guided prediction [n, 4, h, w]
Predict = Callable[["Tensor", "Tensor", int], "Tensor"]
# (model, the concept's names, the guard's settings, prompts) -> embeddings [n, tokens, width], or what else ``guide``
# takes of each prompt
Encode = Callable[["Diffusion", Sequence[str], Any, Sequence[str]], "Tensor"]
# (model, the concept's names, the guard's settings, embeddings [n, tokens, width], uncond [1, tokens, width],
# guidance scales [n, 1, 1, 1], number of sampling steps) -> the prediction of each step
Guide = Callable[["Diffusion", Sequence[str], Any, "Tensor", "Tensor", "Tensor", int], Predict]


def encode_prompts(model: Diffusion, names: Sequence[str], settings: Any, prompts: Sequence[str]) -> Tensor:
    """Encode prompts as the model does."""
    return model.encode_prompts(prompts)


def classifier_free(
    model: Diffusion,
    names: Sequence[str],
    settings: Any,
    embeddings: Tensor,
    uncond: Tensor,
    scale: Tensor,
    steps: int,
) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598), as without a guard; none where no row has a scale above 1."""
    if bool((scale > 1).any()):
        return lambda noisy, timestep, step: model.cfg(noisy, timestep, embeddings, uncond, scale)
    return lambda noisy, timestep, step: model.predict(noisy, timestep.to(noisy.device).expand(len(noisy)), embeddings)


def encode_names(model: Diffusion, names: Sequence[str], uncond: Tensor) -> Tensor:
    """Encode the concept's names as one prompt, [1, tokens, width]."""
    return model.encode_prompts([", ".join(names)]).to(uncond)


@dataclass(frozen=True)
class Guard:
    """The record of a guard: it may change how prompts are encoded, how predictions are guided, or both.

    ``terms`` are by kind of concept what its authors keep out, in the place of a concept's names.
    """

    name: str
    summary: str
    settings: type[Any]  # a class under ``@settings``
    encode: Encode = encode_prompts
    guide: Guide = classifier_free
    paper: str = ""
    terms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class AppliedGuard:
    """A guard with its settings against a concept, which it knows by these names: what ``sample`` takes."""

    guard: Guard
    names: tuple[str, ...]
    settings: Any

    def encode(self, model: Diffusion, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [n, tokens, width] of prompts."""
        return self.guard.encode(model, self.names, self.settings, prompts)

    def guide(self, model: Diffusion, embeddings: Tensor, uncond: Tensor, scale: Tensor, steps: int) -> Predict:
        """Return what predicts each step of one sampling; shapes as for ``Guide``."""
        return self.guard.guide(model, self.names, self.settings, embeddings, uncond, scale, steps)

    def __str__(self) -> str:
        """Name the guard, the settings that are not its defaults, and the concept: for the settings of images."""
        defaults = vars(self.guard.settings())
        changed = [f"{key}={value}" for key, value in vars(self.settings).items() if value != defaults.get(key)]
        told = f" ({', '.join(changed)})" if changed else ""
        return f"{self.guard.name}{told}: {', '.join(self.names)}"
