"""Random label: SalUn's loss on all weights, the control that shows what the mask is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from erase_concept.data import ForgetRetain, Remap
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.methods.salun import SalUnConfig, salun
from erase_concept.pipelines.model import Diffusion
from erase_concept.training.loop import Record, TargetProgress


@dataclass(frozen=True)
class RandomLabelConfig(SalUnConfig):
    """SalUn's settings; each row's label becomes a random other one."""

    remap: Remap = "random"


@method("random-label", RandomLabelConfig, latents=("forget", "anchor", "retain"))
def random_label(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    config: SalUnConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Remap the concept's noise prediction to that of another prompt drawn at random: SalUn without its mask.

    The loss is ``salun``'s; with a mask this is SalUn with ``remap`` "random".
    """
    yield from salun(model, data, mask, config, seed=seed, checkpoint=checkpoint)
