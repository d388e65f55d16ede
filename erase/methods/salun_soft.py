"""SalUn-soft (Fan, Liu et al., ICLR 2024, arXiv 2310.12508): a soft threshold instead of the hard mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from erase_concept.data import ForgetRetain
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.methods.salun import SalUnSettings, check_remap, salun_loss
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, train
from erase_concept.training.shrink import shrink


@settings
class SalUnSoftSettings(SalUnSettings):
    """SalUn's settings, and the weight of the l1 penalty."""

    beta: Annotated[
        float,
        described("Weight of the l1 penalty at the start, in learning rates; it falls to zero.", ge=0, source="ours"),
    ] = 0.5


@method(
    "salun-soft",
    SalUnSoftSettings,
    summary="Trains all weights with SalUn's loss, and draws those that matter little back to the base model.",
    title="SalUn-soft",
    paper="arXiv 2310.12508",
    latents=("forget", "anchor", "retain"),
    check=check_remap,
    memory=lambda settings: (Phase(frozen=settings.batch_size, trained=2 * settings.batch_size, copies=1),),
)
def salun_soft(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: SalUnSoftSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Minimise SalUn's loss plus beta |theta - theta_o|_1: weights that matter little fall back to the base model's.

    By proximal gradient: after step t of T, from 0, with learning rate r, every change of a weight is shrunk towards
    zero,  theta = theta_o + S(theta - theta_o),  S(d) = sign(d) max(|d| - r beta (1 - t / T), 0).
    The authors' code takes a quantile of all |d| as the threshold of each step; the quantile's share falls linearly.
    """
    base = {name: p.detach().clone() for name, p in model.unet.named_parameters()}  # a second UNet's weights in memory
    loss = salun_loss(data, settings)
    for event in train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint):
        if isinstance(event, Record):
            # Before the next step, and before this one gets into the checkpoint.
            shrink(model.unet, base, event.lr * settings.beta * (1 - (event.step - 1) / settings.steps))
        yield event
