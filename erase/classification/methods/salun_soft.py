"""SalUn-soft (Fan, Liu et al., ICLR 2024, arXiv 2310.12508): a soft threshold instead of the hard mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.classification.method import unlearner
from erase_concept.classification.methods.random_label import RandomLabelSettings, epoch_parts, random_label_loss
from erase_concept.classification.training import Events, Schedule, train_epochs
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import Classifier
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record
from erase_concept.training.shrink import shrink


@settings
class SalUnSoftSettings(RandomLabelSettings):
    """Random label's settings, and the share of the weights that falls back."""

    lr: float = 5e-4
    ratio: Annotated[
        float,
        described(
            "Share of the weights that is back at the original's after the first step; it falls to zero.", ge=0, le=1
        ),
    ] = 0.1


@unlearner(
    "salun-soft",
    SalUnSoftSettings,
    summary="Trains all weights with random labels, and draws those that moved least back to the original's.",
    title="SalUn-soft",
    paper="arXiv 2310.12508",
)
def salun_soft(
    model: Classifier,
    data: ForgetRetainImages,
    mask: Mask | None,
    settings: SalUnSoftSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Events:
    """Minimise random label's loss; after each step shrink every change by the size of the smallest ones.

    theta = theta_o + S(theta - theta_o),  S(d) = sign(d) max(|d| - t, 0);  t is the largest of the share
    ratio (1 - progress) of smallest |d|. theta_o is the original; the authors' code begins anew with each epoch.
    """
    base = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    schedule = Schedule(settings.epochs, lambda _: epoch_parts(data, settings), seed)
    for event in train_epochs(model, data, random_label_loss, schedule, mask, settings, checkpoint=checkpoint):
        if isinstance(event, Record):
            share = settings.ratio * (1 - (event.step - 1) / event.steps)
            shrink(model.network, base, smallest(model.network, base, share))
        yield event


@torch.no_grad()
def smallest(network: nn.Module, base: Mapping[str, Tensor], share: float) -> float:
    """Return the largest of a share of smallest sizes of change, over all weights; 0 where the share is none."""
    sizes = torch.cat([(p - base[name]).abs().flatten() for name, p in network.named_parameters()])
    count = round(share * len(sizes))
    return float(sizes.kthvalue(count).values) if count else 0.0
