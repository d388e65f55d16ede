"""Random label: SalUn's loss on all weights, the control that shows what the mask is worth (arXiv 2310.12508)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from erase_concept.data import ForgetRetain, Remap
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.methods.salun import SalUnSettings, salun_loss
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, train


@settings
class RandomLabelSettings(SalUnSettings):
    """SalUn's settings; the label of each row becomes a random other one."""

    remap: Annotated[Remap, described(source="arXiv 2310.12508")] = "random"


@method(
    "random-label",
    RandomLabelSettings,
    summary="Gives the concept's prompts the prediction of another prompt drawn at random: SalUn without its mask.",
    title="Random label",
    paper="arXiv 2310.12508",
    latents=("forget", "anchor", "retain"),
)
def random_label(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: RandomLabelSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Minimise SalUn's loss over all weights; with a mask this is SalUn with ``remap`` "random"."""
    yield from train(model, salun_loss(data, settings), mask, settings, seed=seed, checkpoint=checkpoint)
