"""EraseDiff (Wu et al., CVPR 2025, arXiv 2401.05779)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.data import ForgetRetain, draw, training_loss
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.gradients import dot, onto_half_space, salient_gradient, with_gradient
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train


@settings
class EraseDiffSettings(Training):
    """EraseDiff's settings beside those of the training."""

    eta: Annotated[
        float, described("The constraint falls at least by this share of its own gradient's square.", ge=0)
    ] = 0.1
    inner_steps: Annotated[
        int, described("Steps of gradient descent on the forget loss alone, K.", ge=1, source="the authors' code")
    ] = 2
    inner_lr: Annotated[float, described("Learning rate of the inner steps.", gt=0)] = 1e-3


def _memory(settings: EraseDiffSettings) -> tuple[Phase, ...]:
    """Hold the weights of before the inner steps, and the gradients of constraint, inner step, retain loss and step."""
    descent = int(settings.inner_steps > 1)  # the first inner step's is the constraint's
    return (Phase(trained=settings.batch_size, gradients=3 + descent), Phase(gradients=4 + descent))


@method(
    "erasediff",
    EraseDiffSettings,
    summary="Keeps the loss on everything else low while the concept's prediction is driven towards noise.",
    title="EraseDiff",
    paper="arXiv 2401.05779",
    memory=_memory,
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
    """Keep the retain loss low, under the constraint that the concept's prediction is as close to noise as possible.

    min L_r(theta)  with  g(theta) = L_f(theta) - L_f(phi_K) <= 0,  where phi_K is what K steps of gradient descent on
    L_f make of theta. L_r is the training loss on retain rows and L_f = E |e(x_f,t, c_f) - u|^2 with noise u uniform
    in [0, 1]. A step goes along  dL_r + l dg,  l = max(0, (w - <dL_r, dg>) / |dg|^2),  which is the nearest direction
    to dL_r in which g falls by w = eta |dg|^2 or more; w is 0 where the constraint holds.
    Three things are approximated: D_f by the step's batch; dg by dL_f with phi_K fixed (first order, as in the authors'
    code); gradient descent by Adam. The authors' code has |dL_r| |dg| for |dg|^2 in l, and u for the noise in x_t.
    """
    unet = model.unet

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        forget = data.forget_batch(model, data.draw_forget(settings.batch_size, generator, "forget"), generator)
        retain = data.retain_batch(model, draw(len(data.retain_latents), settings.batch_size, generator), generator)
        uniform = torch.rand(forget.noise.shape, generator=generator).to(model.device)
        target = model.target(forget.latents, uniform, forget.timesteps)

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

    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)
