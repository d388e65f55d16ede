"""Scissorhands (Wu and Harandi, ECCV 2024, arXiv 2401.06187)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from erase_concept import masks
from erase_concept.data import Batch, ForgetRetain, draw, training_loss
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.masks.saliency import accumulate, forgetting_loss
from erase_concept.method import Phase, method
from erase_concept.pipelines.families.family import Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS
from erase_concept.pipelines.model import Diffusion
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings
from erase_concept.training.gradients import onto_half_space, salient_gradient, with_gradient
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

_CODE = "the authors' code"


@settings
class ScissorhandsSettings(Training):
    """Scissorhands' settings beside those of the training; the defaults are those of an Imagenette class."""

    lr: Annotated[float, described(source=_CODE)] = 2e-5
    steps: Annotated[int, described(source=_CODE)] = 79
    trimmed: Annotated[
        float,
        described("Share of the weights, those with the highest connection scores, that count.", ge=0, le=1),
    ] = 0.001
    trim_batches: Annotated[
        int, described("Draws of noise behind the connection scores, for one batch of forget rows.", ge=1, source=_CODE)
    ] = 10
    guidance: Annotated[
        float, described("Guidance w of the prediction behind the connection scores.", ge=0, source=_CODE)
    ] = 7.5
    reset: Annotated[
        Literal["decoder-self-attention", "all"],
        described(
            "Which of the weights that count are reset: those in the self-attention of two decoder blocks, or all.",
            source=_CODE,
        ),
    ] = "decoder-self-attention"
    reset_to: Annotated[
        Literal["normal", "kaiming", "torch"],
        described(
            "New values: normal with deviation 0.02; uniform by Kaiming, for a ReLU; or as torch draws a new layer's.",
            source=_CODE,
        ),
    ] = "normal"
    forget_loss: Annotated[
        Literal["ascent", "anchor"],
        described("Raise the training loss on the concept, or give it the anchor's prediction.", source=_CODE),
    ] = "ascent"
    forget_weight: Annotated[float, described("Weight of the forget loss.", ge=0, source=_CODE)] = 0.1
    projection: Annotated[
        bool,
        described("Keep each step from undoing the reset, by the paper's projection; their code dropped it."),
    ] = False


def _memory(settings: ScissorhandsSettings) -> tuple[Phase, ...]:
    """Hold first the sensitivity and its masked part, then with a projection the gradient not to be opposed."""
    rows = settings.batch_size
    frozen = rows * (settings.forget_loss == "anchor")
    score = Phase(trained=rows * (2 if settings.guidance else 1), copies=1, optimizer=False)
    ranked = Phase(copies=2, optimizer=False)
    if not settings.projection:
        # One loss's gradients wait for the other's.
        return (score, ranked, Phase(frozen=frozen, trained=2 * rows), Phase(trained=rows, gradients=1))
    repair = (Phase(frozen=frozen, trained=2 * rows, copies=1), Phase(trained=rows, copies=1, gradients=1))
    return (ranked, *repair, Phase(copies=1, gradients=2))


@method(
    "scissorhands",
    ScissorhandsSettings,
    summary="Resets the weights that the concept depends on most, then repairs the rest.",
    title="Scissorhands",
    paper="arXiv 2401.06187",
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

    The connection score is SNIP's (arXiv 1810.02340), |theta sum |dL / dtheta||, over draws of noise for one batch of
    forget rows; L is the training loss, of a guided prediction where ``guidance`` says so. Of the weights with the
    highest scores in the whole UNet those in the self-attention of two decoder blocks are reset. Then all weights
    learn:  L_r - w L_f  with the training loss L_r on retain rows and L_f on forget rows, or, with ``forget_loss``
    "anchor",  L_r + w E |e(x_f,t, c_f) - sg e(x_f,t, c')|^2.  With a mask, only its weights are ranked, reset and
    trained.

    The paper also projects: where the gradient g opposes g_o = -dL_f, taken once after the reset, the nearest one with
    <g, g_o> >= 0 takes its place. The authors' code does so no longer.
    """
    unet = model.unet

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        retain = data.retain_batch(model, draw(len(data.retain_latents), settings.batch_size, generator), generator)
        retain_loss = training_loss(model, retain)
        value, forget_loss = _with_forget_loss(retain_loss, model, data, settings, generator)
        if settings.projection:
            direction, _ = onto_half_space(salient_gradient(value, unet, mask), memory)
            value = with_gradient(value, unet, direction)
        return value, {"forget": forget_loss, "retain": retain_loss}

    # Done again when a run resumes: the checkpoint's weights are put in place after it.
    if settings.recompute:
        unet.enable_gradient_checkpointing()
    gradients = accumulate(unet, _score_losses(model, data, settings, seed), "absolute")
    sensitivity = {name: gradients.pop(name) * p.detach().abs() for name, p in unet.named_parameters()}
    counting = chosen(sensitivity, settings.trimmed, mask)
    if settings.reset == "decoder-self-attention":
        counting = counting & decoder_self_attention(unet, model.family.layers)
    trim(unet, counting, stage_generator(seed, "trim"), settings.reset_to)
    del sensitivity, counting  # as large as the weights
    unet.requires_grad_(True)
    if settings.projection:
        rows = _forget_batch(model, data, settings, stage_generator(seed, "memory"))
        memory = salient_gradient(-training_loss(model, rows), unet, mask)
    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)


def _forget_batch(
    model: Diffusion, data: ForgetRetain, settings: ScissorhandsSettings, generator: torch.Generator
) -> Batch:
    return data.forget_batch(model, data.draw_forget(settings.batch_size, generator, "forget"), generator)


def _with_forget_loss(
    retain_loss: Tensor,
    model: Diffusion,
    data: ForgetRetain,
    settings: ScissorhandsSettings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the retain loss with the forget loss added at its weight, or taken off, and the forget loss."""
    batch = _forget_batch(model, data, settings, generator)
    if settings.forget_loss == "ascent":
        forget_loss = training_loss(model, batch)
        return retain_loss - settings.forget_weight * forget_loss, forget_loss
    with torch.no_grad():
        target = model.predict(batch.noisy, batch.timesteps, batch.remapped)
    forget_loss = mse_loss(model.predict(batch.noisy, batch.timesteps, batch.embeddings), target)
    return retain_loss + settings.forget_weight * forget_loss, forget_loss


def _score_losses(
    model: Diffusion, data: ForgetRetain, settings: ScissorhandsSettings, seed: int
) -> Iterator[Callable[[], Tensor]]:
    """Yield the loss of each draw of noise and time steps for the first batch of forget rows."""
    generator = stage_generator(seed, "sensitivity", 0)
    rows = data.draw_forget(settings.batch_size, generator, "forget")
    uncond = data.uncond.to(model.device)
    for number in range(settings.trim_batches):
        generator = generator if number == 0 else stage_generator(seed, "sensitivity", number)
        batch = data.forget_batch(model, rows, generator)
        yield partial(forgetting_loss, model, batch, uncond, settings.guidance)


def chosen(scores: dict[str, Tensor], share: float, mask: Mask | None) -> Mask:
    """Return the mask of the largest scores: a share of the weights that may change, and only among these."""
    if mask is None:
        total = sum(score.numel() for score in scores.values())
        return masks.top_k(scores, masks.keep_count(share, total))
    within = {name: score * mask.dense(name).to(score.device) for name, score in scores.items()}
    return masks.top_k(within, masks.keep_count(share, mask.count)) & mask


def decoder_self_attention(unet: nn.Module, layers: Layers = UNET_LAYERS) -> Mask:
    """Return the mask of the self-attention in the middle layer of the first two decoder blocks that have attention.

    For Stable Diffusion 1.x and 2.x these are CompVis' output_blocks.4 and .7, as in the authors' code: diffusers'
    up_blocks.1.attentions.1 and up_blocks.2.attentions.1. For XL, whose output_blocks.7 has no attention, they are
    up_blocks.0.attentions.1 and up_blocks.1.attentions.1, CompVis' output_blocks.1 and .4. Raises RequestError for a
    UNet without self-attention in its decoder.
    """
    found: dict[int, dict[int, list[str]]] = {}  # parameters by block and layer
    for name, _ in unet.named_parameters():
        place = re.match(r"up_blocks\.(\d+)\.attentions\.(\d+)\.", name)
        if place and layers.group(name) == "self-attention":
            block, layer = map(int, place.groups())
            found.setdefault(block, {}).setdefault(layer, []).append(name)
    if not found:
        raise RequestError("settings.reset", "decoder-self-attention", "the UNet's decoder has none; allowed: all")
    middle = [name for block in sorted(found)[:2] for name in found[block][len(found[block]) // 2]]
    shapes = {name: tuple(p.shape) for name, p in unet.named_parameters() if name in middle}
    return masks.expand_to(masks.all_ones(shapes), unet)


@torch.no_grad()
def trim(module: nn.Module, mask: Mask, generator: torch.Generator, to: str = "torch") -> None:
    """Reset a mask's weights; biases become 0, norms' scales 1.

    New weights are normal with deviation 0.02 (the authors cut the normal distribution off at -2 and 2, which no draw
    reaches), or uniform within sqrt(6 / inputs) for "kaiming" and within 1 / sqrt(inputs) for "torch".
    """
    leak = {"kaiming": 0.0, "torch": math.sqrt(5)}  # torch's own layers are initialised with this leak
    for name, p in module.named_parameters():
        if p.dim() < 2:
            new = torch.full(p.shape, float(name.endswith("weight")))
        elif to == "normal":
            new = 0.02 * torch.randn(p.shape, generator=generator)
        else:
            new = torch.empty(p.shape)
            nn.init.kaiming_uniform_(new, a=leak[to], generator=generator)
        p.copy_(torch.where(mask.dense(name).to(p.device), new.to(p), p))
