"""Edit, then train: a closed-form edit of cross-attention, and a short masked training for what the edit leaves.

It is ours, and the default of the built-in model. It is made of parts of SalUn (arXiv 2310.12508), MACE (arXiv
2403.06135) and ESD (arXiv 2303.07345).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.closed_form import ClosedFormSettings, concept_tokens, edit, matrices, retained_tokens
from erase_concept.data import Batch, ForgetRetain, draw
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

_RIDGE = 1000.0  # of MACE's recipes for single objects
_PRESERVE = 0.1  # of UCE's first code


@settings
class EditThenTrainSettings(Training):
    """The settings beside those of the training; the values were found on the built-in model."""

    steps: Annotated[int, described(source="ours")] = 20
    batch_size: Annotated[int, described(source="ours")] = 16
    lr: Annotated[float, described(source="ours")] = 1e-4
    decay: Annotated[bool, described(source="ours")] = True
    alpha: Annotated[float, described("Weight of the retain loss.", ge=0, source="ours")] = 1.0
    guidance: Annotated[
        float, described("How far the target lies beyond the anchor, away from the concept.", ge=0, source="ours")
    ] = 0.5
    erase_scale: Annotated[
        float,
        described("Weight of the tokens to erase in the closed form, shared by all concepts.", ge=0, source="ours"),
    ] = 8.0


@method(
    "edit-then-train",
    EditThenTrainSettings,
    summary="Edits cross-attention in closed form, then trains the salient weights towards the base model's targets.",
    title="Edit, then train",
    paper="ours",
    trains="the salient half of the UNet",
    latents=("forget", "anchor", "retain"),
    mask="salient",
    sharded=True,
)
def edit_then_train(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: EditThenTrainSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Set keys and values by MACE's closed form, then fit the concept's prompts to the base model's guided anchor.

    First the closed form over the weights of the mask: it takes the concept out of the words behind its name at once.
    Where the mask has no key or value, this part is left out. Then the training over the weights of the mask, of

        E |e(x_t, c_f) - (e*(x_t, c') + w (e*(x_t, c') - e*(x_t, c_f)))|^2
        + alpha * E |e(x_r,t, c_r) - e*(x_r,t, c_r)|^2

    with the concept's prompt c_f, the same prompt said of the anchor c', and the base model e* from before the closed
    form. The first target is ESD's negative guidance from c' instead of the empty prompt: a fit always stops short of
    its target, and sampling would multiply what is left of the concept by its guidance scale. The second term's
    gradient vanishes while nothing has moved. All targets are computed before any weight changes, so that there is no
    second UNet in memory.
    """

    def rows(model: Diffusion, generator: torch.Generator) -> tuple[Batch, Batch]:
        forget = data.forget_batch(model, data.draw_forget(settings.batch_size, generator), generator)
        retain_rows = draw(len(data.retain_latents), settings.batch_size, generator)
        return forget, data.retain_batch(model, retain_rows, generator)

    def precompute(model: Diffusion, generator: torch.Generator) -> Tensors:
        forget, retain = rows(model, generator)
        target = model.predict(forget.noisy, forget.timesteps, forget.remapped)
        if settings.guidance:
            concept = model.predict(forget.noisy, forget.timesteps, forget.embeddings)
            target = target + settings.guidance * (target - concept)
        return target, model.predict(retain.noisy, retain.timesteps, retain.embeddings)

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        forget, retain = rows(model, generator)  # as in precompute: the generator is the step's own
        predicted = model.predict(
            torch.cat([forget.noisy, retain.noisy]),
            torch.cat([forget.timesteps, retain.timesteps]),
            torch.cat([forget.embeddings, retain.embeddings]),
        )
        forget_loss = mse_loss(predicted[: settings.batch_size], targets[0])
        retain_loss = mse_loss(predicted[settings.batch_size :], targets[1])
        return forget_loss + settings.alpha * retain_loss, {"forget": forget_loss, "retain": retain_loss}

    def closed_form(model: Diffusion) -> None:
        if mask is None or any(mask.dense(name).any() for name in matrices(model.unet, model.family.layers)):
            # A mean over concepts, as the training's loss is: a sum of many would outweigh what is to be preserved.
            scale = settings.erase_scale / (int(data.forget_parts.max()) + 1)
            edited = ClosedFormSettings(erase_scale=scale, preserve_scale=_PRESERVE, ridge=_RIDGE)
            pairs = concept_tokens(model, data, "behind-name")
            edit(model, data, mask, edited, *pairs, retained_tokens(model, data))

    yield from train(
        model, loss, mask, settings, seed=seed, checkpoint=checkpoint, precompute=precompute, start=closed_form
    )
