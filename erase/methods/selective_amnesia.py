"""Selective Amnesia (Heng and Soh, NeurIPS 2023, arXiv 2305.10120)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from erase_concept.data import Batch, ForgetRetain, draw, training_loss
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.masks.saliency import accumulate
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train


@settings
class SelectiveAmnesiaSettings(Training):
    """Selective Amnesia's settings beside those of the training."""

    penalty: Annotated[
        float,
        described("Weight of the penalty on moving weights that matter, lambda.", ge=0, source="the authors' code"),
    ] = 50.0
    surrogate: Annotated[
        Literal["anchor", "noise"], described("What the concept's prompts show afterwards.", source="arXiv 2305.10120")
    ] = "anchor"
    fisher_rows: Annotated[
        int,
        described("Retain rows behind the Fisher information.", ge=1, source="ours"),
    ] = 500


def _memory(settings: SelectiveAmnesiaSettings) -> tuple[Phase, ...]:
    """Hold the base model's weights, their Fisher information, and the penalty's gradient."""
    return (Phase(trained=2 * settings.batch_size, copies=2, gradients=1),)


@method(
    "selective-amnesia",
    SelectiveAmnesiaSettings,
    summary="Trains the concept's prompts on other pictures, rehearses the rest, and holds back the weights it needs.",
    title="Selective Amnesia",
    paper="arXiv 2305.10120",
    latents=("anchor", "retain"),
    memory=_memory,
)
def selective_amnesia(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: SelectiveAmnesiaSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Train the concept's prompts on other pictures, rehearse the rest, and hold back the weights that it needs.

    Minimises  E_q L(x, c_f) + E L(x_r, c_r) + lambda / 2 * sum_i F_i (theta_i - theta_o,i)^2  with the training loss L.
    q is the surrogate: the anchor's pictures, or latents uniform in [-1, 1]; x_r are the base model's own samples.
    F_i is the Fisher information E (dl / dtheta_i)^2 of each retain row's evidence bound l, the sum of its training
    losses over all time steps. It is estimated from ``batch_size`` time steps of each row, scaled up; the authors take
    all 1,000 time steps of 5,000 rows. Their code has lambda where the paper has lambda / 2.
    Raises RequestError when the surrogate is the anchor and the data hold no picture of it.
    """
    if settings.surrogate == "anchor" and not len(data.anchor_latents):
        raise RequestError(
            "data.anchor", 0, "selective-amnesia needs pictures of the anchor, or the setting surrogate=noise"
        )
    # A mask may have needed pictures of the concept, from which this method does not learn.
    shown = replace(data, forget_latents=data.forget_latents[:0], forget_which=data.forget_which[:0])
    if settings.surrogate == "noise":
        uniform = torch.rand(data.retain_latents.shape, generator=stage_generator(seed, "surrogate"))
        which = torch.arange(len(uniform)) % len(data.forget)
        shown = replace(shown, anchor_latents=2 * uniform - 1, anchor_which=which)
    unet = model.unet
    # Before any weight changes, also when a run resumes: the checkpoint is read when the training begins.
    information = fisher(model, data, settings, stage_generator(seed, "fisher"))
    base = {name: p.detach().clone() for name, p in unet.named_parameters()}

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        forget = shown.forget_batch(model, shown.draw_forget(settings.batch_size, generator), generator)
        retain = data.retain_batch(model, draw(len(data.retain_latents), settings.batch_size, generator), generator)
        surrogate_loss, retain_loss = training_loss(model, forget), training_loss(model, retain)
        drift = [(information[n] * (p - base[n]).square()).sum() for n, p in unet.named_parameters()]
        penalty = settings.penalty / 2 * torch.stack(drift).sum()
        terms = {"forget": surrogate_loss, "retain": retain_loss, "penalty": penalty}
        return surrogate_loss + retain_loss + penalty, terms

    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)


def fisher(
    model: Diffusion, data: ForgetRetain, settings: SelectiveAmnesiaSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of the model's weights over retain rows, by parameter."""
    steps = model.scheduler.config.num_train_timesteps

    def bound(batch: Batch) -> Tensor:
        return steps * training_loss(model, batch)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for row in draw(len(data.retain_latents), settings.fisher_rows, generator):
            yield partial(bound, data.retain_batch(model, row.expand(settings.batch_size), generator))

    if settings.recompute:
        model.unet.enable_gradient_checkpointing()
    squares = accumulate(model.unet, losses(), "squared")
    return {name: square / settings.fisher_rows for name, square in squares.items()}
