"""SalUn, saliency unlearning (Fan, Liu et al., ICLR 2024, arXiv 2310.12508)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.data import ForgetRetain, Remap, draw
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Loss, Record, TargetProgress, Tensors, Training, train

if TYPE_CHECKING:
    from erase_concept.recipe import Recipe

_PAPER = "arXiv 2310.12508"


@settings
class SalUnSettings(Training):
    """SalUn's settings beside those of the training."""

    alpha: Annotated[
        float, described("Weight of the retain loss.", ge=0, source=f"{_PAPER}, for an Imagenette class")
    ] = 0.5
    remap: Annotated[
        Remap,
        described(
            "What the concept's prompts become: the anchor, a random retained name for each row, or the empty prompt.",
            source=_PAPER,
        ),
    ] = "anchor"


def check_remap(recipe: Recipe) -> None:
    """Refuse to remap a concept to random names when it has none."""
    for concept in recipe.concept.parts:
        if recipe.settings.remap == "random" and not any((*concept.anchor_prompts, *concept.retain)):
            least = f"needs names to choose from, and {concept.name} has no anchor and retains none"
            raise RequestError("settings.remap", "random", f"{least}; name some, or choose empty")


@method(
    "salun",
    SalUnSettings,
    summary="Gives the concept's prompts the prediction of another prompt, in the salient weights alone.",
    title="SalUn",
    paper="arXiv 2310.12508",
    trains="the salient half of the UNet",
    latents=("forget", "anchor", "retain"),
    mask="salient",
    check=check_remap,
    bf16_weights=True,
    sharded=True,
)
def salun(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: SalUnSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Minimise SalUn's loss over the weights of the mask; see ``salun_loss``. Without a mask it is random labelling."""
    yield from train(model, salun_loss(data, settings), mask, settings, seed=seed, checkpoint=checkpoint)


def salun_loss(data: ForgetRetain, settings: SalUnSettings) -> Loss:
    """Return SalUn's loss:  E |e(x_t, c_f) - sg e(x_t, c')|^2 + alpha * E |e(x_r,t, c_r) - noise|^2.

    c_f is the concept's prompt and c' the one that it is remapped to. Both predictions of the first term are made of
    the same noisy latents x_t by the current model, as in the authors' code. No gradient goes through sg.
    """

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        rows = data.draw_forget(settings.batch_size, generator)
        forget = data.forget_batch(model, rows, generator, remap=settings.remap)
        retain = data.retain_batch(model, draw(len(data.retain_latents), settings.batch_size, generator), generator)
        with torch.no_grad():
            target = model.predict(forget.noisy, forget.timesteps, forget.remapped)
        predicted = model.predict(
            torch.cat([forget.noisy, retain.noisy]),
            torch.cat([forget.timesteps, retain.timesteps]),
            torch.cat([forget.embeddings, retain.embeddings]),
        )
        forget_loss = mse_loss(predicted[: len(target)], target)
        retain_loss = mse_loss(predicted[len(target) :], model.target(retain.latents, retain.noise, retain.timesteps))
        return forget_loss + settings.alpha * retain_loss, {"forget": forget_loss, "retain": retain_loss}

    return loss
