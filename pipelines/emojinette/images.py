"""Renderings of the artwork that the built-in model learnt from, as images for classifiers: 20 objects in 4 styles."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.pipelines.classifiers.images import ImageData
from erase_concept.pipelines.emojinette import CATALOG, artwork

COUNTS = {"train": 8000, "test": 2000}
_SEEDS = {"train": 2, "test": 3}  # 1 is that of the images by which the model is judged


@dataclass(frozen=True, eq=False)
class Renderings:
    """Renderings scaled to a side, each drawn when it is first asked for."""

    folder: Path
    seed: int
    count: int
    size: int
    drawn: dict[int, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return (3, self.size, self.size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Tensor) -> Tensor:
        missing = [row for row in dict.fromkeys(rows.tolist()) if row not in self.drawn]
        for row, image in zip(missing, artwork.render_rows(self.folder, self.seed, missing), strict=True):
            scaled = Image.fromarray(image)
            if scaled.size != (self.size, self.size):
                scaled = scaled.resize((self.size, self.size), Image.Resampling.LANCZOS)
            self.drawn[row] = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
        return torch.stack([self.drawn[row] for row in rows.tolist()])

    def sha256(self) -> str:
        """Return the SHA-256 over what is drawn, and the names and sizes of the artwork's files."""
        files = sorted(file for one in artwork.PACKAGES for file in (self.folder / one).rglob("*") if file.is_file())
        told = [f"{file.relative_to(self.folder).as_posix()} {file.stat().st_size}" for file in files]
        return hashlib.sha256("\n".join([f"{self.seed} {self.count} {self.size}", *told]).encode()).hexdigest()


def read(source: str, folder: Path, size: int) -> ImageData:
    """Return renderings of the artwork in a folder, with the objects as classes.

    Raises RequestError where the folder lacks some of it, which
    ``python -m erase_concept.pipelines.emojinette.artwork DIR`` fetches.
    """
    missing = [package for package in artwork.PACKAGES if not (folder / package).is_dir()]
    if missing:
        how = f"python -m {artwork.__name__} {folder} fetches the artwork with npm"
        raise RequestError("data.source", source, f"{folder} has no {missing[0]}; {how}")
    try:
        artwork.load(folder)
    except ImportError:
        how = 'needs resvg_py: pip install "erase-concept[train]"'
        raise RequestError("data.source", source, how) from None
    train, test = (Renderings(folder, _SEEDS[part], COUNTS[part], size) for part in COUNTS)
    labels = [torch.arange(count) % len(CATALOG.objects) for count in COUNTS.values()]
    return ImageData(source.partition(":")[0], train, labels[0], test, labels[1], CATALOG.labels)
