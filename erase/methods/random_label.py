"""Random label: SalUn's loss on all weights, the control that shows what the mask is worth (arXiv 2310.12508)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from erase_concept.data import ForgetRetain
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.methods.salun import SalUnSettings, check_remap, salun_loss
from erase_concept.pipelines.model import Diffusion
from erase_concept.training.loop import Record, TargetProgress, train


@method(
    "random-label",
    SalUnSettings,
    summary="SalUn without its mask: gives the concept's prompts the prediction of another prompt, in all weights.",
    title="Random label",
    paper="arXiv 2310.12508",
    latents=("forget", "anchor", "retain"),
    check=check_remap,
    sharded=True,
)
def random_label(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: SalUnSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Minimise SalUn's loss over all weights; with a mask this is SalUn.

    As in the authors' code for Stable Diffusion the label becomes the anchor. With ``remap`` "random" it becomes a
    random retained name for each row, as in classification.
    """
    yield from train(model, salun_loss(data, settings), mask, settings, seed=seed, checkpoint=checkpoint)
