"""EraseDiff (Wu et al., CVPR 2025, arXiv 2401.05779)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.data import Batch, ForgetRetain, draw, training_loss
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.checkpoint import steps_done
from erase_concept.training.gradients import dot, onto_half_space, salient_gradient, with_gradient
from erase_concept.training.loop import Loss, Record, TargetProgress, Tensors, Training, train

if TYPE_CHECKING:
    from erase_concept.recipe import Recipe

_CODE = "the authors' code"
_PAPER = "arXiv 2401.05779"


@settings
class EraseDiffSettings(Training):
    """EraseDiff's settings beside those of the training."""

    steps: Annotated[int, described("Training steps, those of the inner passes too.", source=_CODE)] = 120
    batch_size: Annotated[int, described(source=_CODE)] = 16
    target: Annotated[
        Literal["anchor", "noise"],
        described(
            "What the concept's prediction is driven to: the current model's for the anchor's prompt, as in the "
            "authors' code for Stable Diffusion, or noise uniform in [0, 1], as in the paper.",
            source=_CODE,
        ),
    ] = "anchor"
    constraint: Annotated[
        Literal["weight", "projection"],
        described(
            "How the forget loss is kept low: by a fixed weight, as in the authors' code, or by a projection of the "
            "gradient, as in the paper.",
            source=_CODE,
        ),
    ] = "weight"
    forget_weight: Annotated[
        float, described("Weight of the forget loss, lambda, for the constraint weight.", ge=0, source=_CODE)
    ] = 1.0
    passes: Annotated[
        int, described("Passes over the forget rows in an epoch, K, for the constraint weight.", ge=1, source=_CODE)
    ] = 1
    eta: Annotated[
        float,
        described("By which share of its gradient's square the constraint falls, for projection.", ge=0, source=_PAPER),
    ] = 0.1
    inner_steps: Annotated[
        int,
        described("Steps of gradient descent on the forget loss alone, K, for projection.", ge=1, source=_PAPER),
    ] = 2
    inner_lr: Annotated[float, described("Learning rate of the inner steps, for projection.", gt=0)] = 1e-3

    def epoch_steps(self, rows: int) -> int:
        """Return the steps of an epoch: with the constraint weight K inner passes over the rows, and K outer ones."""
        factor = 2 * self.passes if self.constraint == "weight" else 1
        return factor * super().epoch_steps(rows)

    def can_resume_after(self, step: int) -> bool:
        """Tell whether a run can go on from a step: with the constraint weight, from the end of an epoch alone."""
        return self.constraint == "projection" or step % self.checkpoint_every == 0

    def logged_steps(self, concepts: int) -> int | None:
        """Return the steps of a projection; those of the constraint weight are rounded down to whole epochs."""
        return self.steps if self.constraint == "projection" else None


def _check(recipe: Recipe) -> None:
    """Refuse a recipe with fewer steps than an epoch has passes."""
    asked: EraseDiffSettings = recipe.settings
    if asked.constraint == "weight" and asked.epochs is None and asked.steps < 2 * asked.passes:
        least = f"must be at least {2 * asked.passes}: {asked.passes} inner and as many outer passes"
        raise RequestError("settings.steps", asked.steps, least)


def _memory(settings: EraseDiffSettings) -> tuple[Phase, ...]:
    """Hold the weights of before; for a projection also gradients of constraint, inner step, retain loss and step."""
    size = settings.batch_size
    if settings.constraint == "weight":
        both = Phase(frozen=size * (settings.target == "anchor"), trained=2 * size, copies=1)
        return (both, Phase(trained=size, copies=1, gradients=1))  # one loss's gradients wait for the other's
    descent = int(settings.inner_steps > 1)  # the first inner step's is the constraint's
    return (Phase(trained=size, gradients=3 + descent), Phase(gradients=4 + descent))


@method(
    "erasediff",
    EraseDiffSettings,
    summary="Keeps the loss on everything else low while the concept's prediction is driven to another one.",
    title="EraseDiff",
    paper=_PAPER,
    memory=_memory,
    check=_check,
)
def erasediff(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: EraseDiffSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Keep the retain loss low while the concept's prediction is driven to another prompt's.

    The authors' code for Stable Diffusion, ``constraint`` "weight": an epoch begins with the weights theta and makes K
    times two passes over the forget rows. The inner one minimises  L_f = E |e(x_f,t, c_f) - sg e(x_f,t, c')|^2,  and
    theta is put back after it. The outer one then minimises  L_r + lambda (L_f - L),  with the training loss L_r on
    retain rows and the inner pass's mean L of L_f. L is constant, so the gradient is that of L_r + lambda L_f. Of an
    epoch only the last outer pass remains; Adam's moments are kept through all passes. Steps are rounded down to whole
    epochs.

    The paper, "projection":  min L_r(theta)  with  g(theta) = L_f(theta) - L_f(phi_K) <= 0,  where phi_K is what K
    steps of gradient descent on L_f make of theta. A step goes along  dL_r + l dg,
    l = max(0, (w - <dL_r, dg>) / |dg|^2),  the nearest direction to dL_r in which g falls by w = eta |dg|^2 or more;
    w is 0 where the constraint holds. Three things are approximated: D_f by the step's batch; dg by dL_f with phi_K
    fixed (first order); gradient descent by Adam.
    """
    if settings.constraint == "projection":
        loss = _projected(data, mask, settings)
        yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)
        return
    length, epochs = pass_length(settings, len(data.forget_latents))
    epoch = 2 * settings.passes * length
    # At the end of an epoch the weights are its whole state: within it they would not be enough to go on from.
    whole = replace(settings, steps=epochs * epoch, checkpoint_every=epoch)
    theta: dict[str, Tensor] = {}
    step, inner_losses = steps_done(checkpoint), list[float]()

    def weighted(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        if step % epoch == 0:
            theta.update({n: p.detach().clone() for n, p in model.unet.named_parameters() if p.requires_grad})
        forget_loss = mse_loss(*_prediction_and_target(model, data, settings, generator))
        if step % (2 * length) < length:
            return forget_loss, {"forget": forget_loss}
        retain_loss = training_loss(model, _retain(model, data, settings, generator))
        gap = forget_loss - sum(inner_losses) / len(inner_losses)
        return retain_loss + settings.forget_weight * gap, {"forget": forget_loss, "retain": retain_loss}

    for event in train(model, weighted, mask, whole, seed=seed, checkpoint=checkpoint):
        if isinstance(event, Record):
            step = event.step
            place = (step - 1) % (2 * length)  # of the step that was taken, in the inner pass and the outer one
            if place < length:
                inner_losses = [*(inner_losses if place else ()), event.terms["forget"]]
            if place == length - 1:
                _put_back(model, theta)
        yield event


@torch.no_grad()
def _put_back(model: Diffusion, weights: dict[str, Tensor]) -> None:
    for name, p in model.unet.named_parameters():
        p.copy_(weights.get(name, p))


def pass_length(settings: EraseDiffSettings, rows: int) -> tuple[int, int]:
    """Return the steps of a pass over so many forget rows, and the epochs; in less than an epoch passes are shorter."""
    epoch, passes = settings.epoch_steps(rows), 2 * settings.passes
    if settings.steps < epoch:
        return max(1, settings.steps // passes), 1
    return epoch // passes, settings.steps // epoch


def _retain(model: Diffusion, data: ForgetRetain, settings: EraseDiffSettings, generator: torch.Generator) -> Batch:
    return data.retain_batch(model, draw(len(data.retain_latents), settings.batch_size, generator), generator)


def _prediction_and_target(
    model: Diffusion, data: ForgetRetain, settings: EraseDiffSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the prediction for a batch of forget rows, with gradient, and what it is driven to."""
    forget = data.forget_batch(model, data.draw_forget(settings.batch_size, generator, "forget"), generator)
    target = _target(model, forget, settings, generator)
    return model.predict(forget.noisy, forget.timesteps, forget.embeddings), target


@torch.no_grad()
def _target(model: Diffusion, forget: Batch, settings: EraseDiffSettings, generator: torch.Generator) -> Tensor:
    if settings.target == "anchor":
        return model.predict(forget.noisy, forget.timesteps, forget.remapped)
    uniform = torch.rand(forget.noise.shape, generator=generator).to(model.device)
    return model.target(forget.latents, uniform, forget.timesteps)


def _projected(data: ForgetRetain, mask: Mask | None, settings: EraseDiffSettings) -> Loss:
    """Return the loss whose gradient is the paper's direction."""

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        unet = model.unet
        forget = data.forget_batch(model, data.draw_forget(settings.batch_size, generator, "forget"), generator)
        retain = _retain(model, data, settings, generator)
        target = _target(model, forget, settings, generator)

        def forget_loss() -> Tensor:
            return mse_loss(model.predict(forget.noisy, forget.timesteps, forget.embeddings), target)

        moving = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in moving.items()}
        now = forget_loss()
        descent = constraint = salient_gradient(now, unet, mask)
        for step in range(settings.inner_steps):
            if step:
                descent = salient_gradient(forget_loss(), unet, mask)
            with torch.no_grad():
                for name, p in moving.items():
                    p.sub_(settings.inner_lr * descent[name])
        with torch.no_grad():
            gap = now.detach() - forget_loss()
            for name, p in moving.items():
                p.copy_(start[name])
        retain_loss = training_loss(model, retain)
        gradient = salient_gradient(retain_loss, unet, mask)
        at_least = settings.eta * dot(constraint, constraint) * (gap > 0)
        direction, multiplier = onto_half_space(gradient, constraint, at_least)
        value = with_gradient(retain_loss + multiplier * now.detach(), unet, direction)
        return value, {"forget": now, "retain": retain_loss, "gap": gap, "multiplier": multiplier}

    return loss
