"""Scissorhands (Wu and Harandi, ECCV 2024, arXiv 2401.06187)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw, training_loss
from erase_concept.masks.mask import Mask
from erase_concept.masks.saliency import accumulate
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings
from erase_concept.training.gradients import onto_half_space, salient_gradient, with_gradient
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

_CODE = "the authors' code"


@settings
class ScissorhandsSettings(Training):
    """Scissorhands' settings beside those of the training."""

    lr: float = 5e-5
    batch_size: Annotated[int, described(source=_CODE)] = 16
    trimmed: Annotated[
        float, described("Share of the weights that are reset, of those that may change.", ge=0, le=1)
    ] = 0.1
    trim_batches: Annotated[int, described("Batches of forget rows behind the sensitivity.", ge=1)] = 1
    ascent: Annotated[float, described("Weight of the forget loss, which rises.", ge=0, source=_CODE)] = 0.1


def _memory(settings: ScissorhandsSettings) -> tuple[Phase, ...]:
    """Hold first the sensitivity and its masked part, then the gradient that must not be opposed."""
    rows = settings.batch_size
    return (
        Phase(copies=2, optimizer=False),
        Phase(trained=2 * rows, copies=1),
        Phase(trained=rows, copies=1, gradients=1),
        Phase(copies=1, gradients=2),
    )


@method(
    "scissorhands",
    ScissorhandsSettings,
    summary="Resets the weights that the concept depends on most, then repairs the rest.",
    title="Scissorhands",
    paper="arXiv 2401.06187",
    trains="self-attention",
    scope="self-attention",
    memory=_memory,
)
def scissorhands(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ScissorhandsSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Reset the weights that the concept depends on most, then repair the rest without bringing it back.

    The sensitivity is SNIP's (arXiv 1810.02340), |theta dL_f / dtheta|, with the sizes of the gradients summed over
    batches of the training loss L_f on forget rows. The repair minimises  L_r - ascent L_f,  L_r on retain rows. Where
    its gradient g opposes g_o = -dL_f, taken once after the reset, the nearest one with <g, g_o> >= 0 takes its place.
    With a mask, only its weights are ranked, reset and trained. The authors rank the whole UNet; for Stable Diffusion
    they reset only weights of two self-attention blocks, and do not project.
    """
    unet = model.unet

    def forget_loss(generator: torch.Generator) -> Tensor:
        rows = data.draw_forget(settings.batch_size, generator, "forget")
        return training_loss(model, data.forget_batch(model, rows, generator))

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        retain = data.retain_batch(model, draw(len(data.retain_latents), settings.batch_size, generator), generator)
        retain_loss, forgotten = training_loss(model, retain), forget_loss(generator)
        value = retain_loss - settings.ascent * forgotten
        direction, _ = onto_half_space(salient_gradient(value, unet, mask), memory)
        return with_gradient(value, unet, direction), {"forget": forgotten, "retain": retain_loss}

    # Done again when a run resumes: the checkpoint's weights are put in place after it.
    if settings.recompute:
        unet.enable_gradient_checkpointing()
    batches = [stage_generator(seed, "sensitivity", batch) for batch in range(settings.trim_batches)]
    gradients = accumulate(unet, [partial(forget_loss, g) for g in batches], "absolute")
    sensitivity = {name: gradients.pop(name) * p.detach().abs() for name, p in unet.named_parameters()}
    trim(unet, chosen(sensitivity, settings.trimmed, mask), stage_generator(seed, "trim"))
    del gradients, sensitivity  # as large as the weights
    unet.requires_grad_(True)
    memory = salient_gradient(-forget_loss(stage_generator(seed, "memory")), unet, mask)
    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)


def chosen(scores: dict[str, Tensor], share: float, mask: Mask | None) -> Mask:
    """Return the mask of the largest scores: a share of the weights that may change, and only among these."""
    if mask is None:
        total = sum(score.numel() for score in scores.values())
        return masks.top_k(scores, masks.keep_count(share, total))
    within = {name: score * mask.dense(name).to(score.device) for name, score in scores.items()}
    return masks.top_k(within, masks.keep_count(share, mask.count)) & mask


@torch.no_grad()
def trim(module: nn.Module, mask: Mask, generator: torch.Generator) -> None:
    """Reset a mask's weights as torch initialises them: uniform within 1 / sqrt(inputs), biases 0, norms' scales 1."""
    for name, p in module.named_parameters():
        if p.dim() < 2:
            new = torch.full(p.shape, float(name.endswith("weight")))
        else:
            new = torch.empty(p.shape)
            nn.init.kaiming_uniform_(new, a=math.sqrt(5), generator=generator)
        p.copy_(torch.where(mask.dense(name).to(p.device), new.to(p), p))
