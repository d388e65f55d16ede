"""l1-sparse: sparsity-aware unlearning (Jia, Liu et al., NeurIPS 2023, arXiv 2304.04934)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from erase_concept.data import ForgetRetain, draw, training_loss
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.checkpoint import steps_done
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train


@settings
class L1SparseSettings(Training):
    """l1-sparse's settings beside those of the training. Its authors ran no diffusion model: all of them are ours.

    Adam moves a weight by about ``lr`` in a step, and the penalty draws most weights towards zero in every step. So a
    run moves them by about  lr * steps,  0.00025 by default. That is a twentieth of the mean size of a weight in a
    layer with 10,000 inputs, 0.005 as torch initialises it, and less where there are fewer inputs.
    """

    lr: Annotated[float, described(source="ours")] = 5e-7
    gamma: Annotated[float, described("Weight of the l1 norm at the start; it falls to zero.", ge=0)] = 5e-4


@method(
    "l1-sparse",
    L1SparseSettings,
    summary="Trains on everything else under an l1 penalty, so that what is not rehearsed fades.",
    title="l1-sparse",
    paper="arXiv 2304.04934",
    latents=("retain",),
    memory=lambda settings: (Phase(trained=settings.batch_size, gradients=1),),
)
def l1_sparse(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: L1SparseSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Train on what is retained under an l1 penalty: what is not rehearsed fades as the weights shrink.

    Minimises  E |e(x_r,t, c_r) - noise|^2 + gamma (1 - t / T) |theta|_1  in step t of T, from 0. The size of the
    penalty's gradient is gamma in every weight. Where the training loss has a smaller gradient, Adam makes a whole step
    of it, however small gamma is. The method never sees the concept.
    """
    step = steps_done(checkpoint)

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw(len(data.retain_latents), settings.batch_size, generator)
        retain_loss = training_loss(model, data.retain_batch(model, rows, generator))
        norm = torch.stack([p.abs().sum() for p in model.unet.parameters()]).sum()
        gamma = settings.gamma * (1 - step / settings.steps)
        return retain_loss + gamma * norm, {"retain": retain_loss, "l1": norm}

    for event in train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint):
        if isinstance(event, Record):
            step = event.step
        yield event
