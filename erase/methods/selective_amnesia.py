"""Selective Amnesia (Heng and Soh, NeurIPS 2023, arXiv 2305.10120)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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

if TYPE_CHECKING:
    from erase_concept.recipe import Recipe

_CODE = "the authors' code"
_NO_ANCHOR = "selective-amnesia needs pictures of the anchor, or the setting surrogate=noise"


@settings
class SelectiveAmnesiaSettings(Training):
    """Selective Amnesia's settings beside those of the training; the defaults are those of a celebrity."""

    steps: Annotated[int, described(source="the authors' code: 200 epochs of 1,000 pictures")] = 12600
    batch_size: Annotated[int, described(source="the authors' code: 4 rows on 4 GPUs")] = 16
    lr: Annotated[float, described(source="the authors' code: 1e-5 times 4 rows on 4 GPUs")] = 1.6e-4
    optimizer: Annotated[Literal["adam", "adamw"], described(source=_CODE)] = "adamw"
    weight_decay: Annotated[float, described(source="torch's default, as in the authors' code")] = 0.01
    penalty: Annotated[
        float,
        described("Weight of the penalty on moving weights that matter, lambda.", ge=0, source=_CODE),
    ] = 50.0
    surrogate: Annotated[
        Literal["anchor", "noise"], described("What the concept's prompts show afterwards.", source="arXiv 2305.10120")
    ] = "anchor"
    fisher_rows: Annotated[
        int,
        described("Retain rows behind the Fisher information; the authors take 5,000.", ge=1, source="ours"),
    ] = 500
    fisher_steps: Annotated[
        int,
        described("Time steps of each row behind the Fisher information; the authors take all.", ge=2, source="ours"),
    ] = 8
    fisher_unbiased: Annotated[
        bool,
        described(
            "Take each time step's gradient by itself; otherwise one gradient of batch_size time steps, whose square "
            "is too large by their noise."
        ),
    ] = True


def _check(recipe: Recipe) -> None:
    """Refuse a recipe without pictures of the anchor, where these are the surrogate."""
    if recipe.settings.surrogate == "anchor" and not recipe.data.anchor:
        raise RequestError("data.anchor", 0, _NO_ANCHOR)


def _memory(settings: SelectiveAmnesiaSettings) -> tuple[Phase, ...]:
    """Hold the base model's weights, their Fisher information, and the penalty's gradient.

    While the Fisher information is estimated there is less: it, and a sum of gradients.
    """
    return (Phase(trained=2 * settings.batch_size, copies=2, gradients=1),)


@method(
    "selective-amnesia",
    SelectiveAmnesiaSettings,
    summary="Trains the concept's prompts on other pictures, rehearses the rest, and holds back the weights it needs.",
    title="Selective Amnesia",
    paper="arXiv 2305.10120",
    latents=("anchor", "retain"),
    memory=_memory,
    check=_check,
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

    Minimises  E_q L(x, c_f) + E L(x_r, c_r) + lambda * sum_i F_i (theta_i - theta_o,i)^2  with the training loss L.
    Lambda is as in the authors' code; the paper has lambda / 2. q is the surrogate: the anchor's pictures, or latents
    uniform in [-1, 1]; x_r are the base model's own samples. F_i is the Fisher information E (dl / dtheta_i)^2 of each
    retain row's evidence bound l, the sum of its training losses over all time steps; see ``fisher``.
    Raises RequestError when the surrogate is the anchor and the data hold no picture of it.
    """
    if settings.surrogate == "anchor" and not len(data.anchor_latents):
        raise RequestError("data.anchor", 0, _NO_ANCHOR)
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
        penalty = settings.penalty * torch.stack(drift).sum()
        terms = {"forget": surrogate_loss, "retain": retain_loss, "penalty": penalty}
        return surrogate_loss + retain_loss + penalty, terms

    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)


def fisher(
    model: Diffusion, data: ForgetRetain, settings: SelectiveAmnesiaSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of the model's weights over retain rows, by parameter.

    Of a row it is the square of  sum_t g_t,  the gradients of its losses at all T time steps. ``fisher_steps`` B of
    them are drawn without repetition. The square of their sum, scaled up, would be too large by their noise. So it is

        T (T - 1) / (B (B - 1)) (sum g)^2 - T (T - B) / (B (B - 1)) sum g^2,

    whose mean over all draws is exact for any B; B = T gives the square itself. The sum over rows is cut off at 0.
    """
    if settings.recompute:
        model.unet.enable_gradient_checkpointing()
    rows = draw(len(data.retain_latents), settings.fisher_rows, generator)
    if not settings.fisher_unbiased:
        return _fisher_of_batches(model, data, settings, rows, generator)
    total, drawn = model.scheduler.config.num_train_timesteps, settings.fisher_steps
    pairs = drawn * (drawn - 1)
    of_sum, of_squares = total * (total - 1) / pairs, -total * (total - drawn) / pairs
    parameters = dict(model.unet.requires_grad_(True).named_parameters())
    information = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for timestep in draw(total, drawn, generator):
            batch = data.retain_batch(model, row[None], generator, timesteps=timestep[None])
            training_loss(model, batch).backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    sums[name] += p.grad
                    information[name].addcmul_(p.grad, p.grad, value=of_squares / len(rows))
                p.grad = None
        for name, gradient in sums.items():
            information[name].addcmul_(gradient, gradient, value=of_sum / len(rows))
    model.unet.requires_grad_(False)
    return {name: one.clamp_(min=0) for name, one in information.items()}


def _fisher_of_batches(
    model: Diffusion,
    data: ForgetRetain,
    settings: SelectiveAmnesiaSettings,
    rows: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the mean square of one gradient of each row, of ``batch_size`` time steps, scaled up to all of them."""
    steps = model.scheduler.config.num_train_timesteps

    def bound(batch: Batch) -> Tensor:
        return steps * training_loss(model, batch)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for row in rows:
            yield partial(bound, data.retain_batch(model, row.expand(settings.batch_size), generator))

    squares = accumulate(model.unet, losses(), "squared")
    return {name: square / settings.fisher_rows for name, square in squares.items()}
