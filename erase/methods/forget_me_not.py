"""Forget-Me-Not (Zhang et al., CVPR workshops 2024, arXiv 2303.17591)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from erase_concept.data import ForgetRetain
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.attention import attention_maps, cross_attentions
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

_CODE = "the authors' code"


@settings
class ForgetMeNotSettings(Training):
    """Forget-Me-Not's settings."""

    steps: Annotated[int, described(source=_CODE)] = 35
    batch_size: Annotated[int, described("Forget rows in a step.", source=_CODE)] = 1
    lr: Annotated[float, described(source=_CODE)] = 2e-6
    optimizer: Annotated[Literal["adam", "adamw"], described(source=_CODE)] = "adamw"
    weight_decay: Annotated[float, described(source=_CODE)] = 0.01
    max_grad_norm: Annotated[float | None, described(source=_CODE)] = 1.0
    norm: Annotated[
        Literal["frobenius", "squared"],
        described("The size of the attention: one Frobenius norm of all maps, or its square.", source=_CODE),
    ] = "frobenius"
    end_token: Annotated[bool, described("Count the end token as one of the concept's.", source=_CODE)] = True


@method(
    "forget-me-not",
    ForgetMeNotSettings,
    summary="Draws the attention of pictures of the concept away from the words that name it.",
    title="Forget-Me-Not",
    paper="arXiv 2303.17591",
    latents=("forget",),
    memory=lambda settings: (Phase(trained=settings.batch_size, gradients=int(settings.max_grad_norm is not None)),),
    bf16_weights=True,
)
def forget_me_not(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ForgetMeNotSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Draw the attention of pictures of the concept away from the words that name it.

    Minimises  (E sum |A_i|^2)^(1/2)  over all cross-attentions, their heads and the concept's tokens i. A_i is the map
    of how much each place of x_t attends to the token, and x_t shows the concept: attention resteering. With
    ``norm`` "squared" there is no root. The end token counts as one of the concept's, for it knows of all the words
    before it; where prompts are padded with end tokens, the first one does. The authors first learn embeddings of the
    concept (textual inversion): here its own words name it.
    """

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        rows = data.draw_forget(settings.batch_size, generator)
        batch = data.forget_batch(model, rows, generator)
        which = torch.cat([data.forget_which, data.anchor_which])[rows]
        with cross_attentions(model.unet, model.family.layers) as seen:
            model.predict(batch.noisy, batch.timesteps, batch.embeddings)
        first, behind = data.forget_spans[which].to(model.device).T[..., None, None, None]
        # CLIP's end token has the largest number of all, and argmax finds the first of them.
        end = data.forget_ids[which].argmax(-1).to(model.device)[:, None, None, None]
        resteering = batch.noisy.new_zeros(())
        for layer, pixels, tokens in seen:
            maps = attention_maps(layer, pixels, tokens)
            place = torch.arange(maps.shape[-1], device=maps.device)
            named = (first <= place) & (place < behind) | (settings.end_token & (place == end))  # [n, 1, 1, tokens]
            resteering = resteering + (maps.square() * named).sum() / len(maps)
        resteering = resteering.sqrt() if settings.norm == "frobenius" else resteering
        return resteering, {"forget": resteering}

    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)
