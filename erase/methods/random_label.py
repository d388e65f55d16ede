"""Random label: SalUn's loss on all weights, the control that shows what the mask is worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from erase_concept.data import ForgetRetain
from erase_concept.mask import Mask
from erase_concept.method import method
from erase_concept.methods.salun import SalUnConfig, salun
from erase_concept.pipelines.diffusion import Diffusion
from erase_concept.train import Record, Taught


@method("random-label", SalUnConfig, masked=False)
def random_label(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    config: SalUnConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | Taught]:
    """Remap the concept's noise prediction to another prompt's, on all weights: SalUn without its mask.

    Raises ValueError when it is given a mask.
    """
    if mask is not None:
        raise ValueError("random-label takes no mask: use salun")
    yield from salun(model, data, None, config, seed=seed, checkpoint=checkpoint)
