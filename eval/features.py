"""Features of images: the type of a network that gives them, reading image files, and keeping features on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write, file_sha256
from erase_concept.pipelines.formats.tensors import save_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that turns images into features.

    It takes uint8 images [n, h, w, 3] of one size and returns float32 [n, d]. ``name`` is what it is asked for by,
    ``title`` what protocols call it. ``weights`` is the SHA-256 of its weights, by
    which kept features are found again. ``network`` takes uint8 [n, 3, h, w] on the device that Accelerate picks.
    """

    name: str
    title: str
    weights: str
    network: Callable[[Tensor], Tensor]

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the features of one batch."""
        import torch

        from erase_concept.pipelines.processes import processes

        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
            return self.network(batch.to(processes().device)).float().cpu().numpy()

    @property
    def suffix(self) -> str:
        """The name as it ends the name of a metric."""
        return self.name.replace("-", "_")


def read_image(file: Path, *, setting: str = "images") -> NDArray[np.uint8]:
    """Return an image as uint8 [h, w, 3]; raises RequestError where the file holds none that can be read."""
    from erase_concept.pipelines.pictures import read_picture

    return np.asarray(read_picture(file, setting=setting))


def image_features(
    files: Sequence[Path], network: Extractor, *, batch_size: int = 8, cache: Path | None = None
) -> NDArray[np.float32]:
    """Return the features [n, d] of image files; equal files are extracted once.

    Batches hold images of one size. The folder ``cache`` keeps the features of a set of images under a name made of the
    extractor's weights and the files' bytes, in whatever order, so the same set is never extracted again. Raises
    RequestError without any files, and for one that is no readable image.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not files:
        raise RequestError("images", "(empty)", "no images")
    try:
        hashes = [file_sha256(file) for file in files]
    except OSError as problem:
        raise RequestError("images", problem.filename, str(problem.strerror)) from None
    unique, first, places = np.unique(hashes, return_index=True, return_inverse=True)
    if cache is None:
        return _extracted([files[place] for place in first], network, batch_size)[places]
    name = hashlib.sha256("".join((network.name, network.weights, *unique)).encode()).hexdigest()
    stored = cache / f"{network.name}-{name}.safetensors"
    try:
        found: NDArray[np.float32] = load_file(stored)["features"]
    except (OSError, SafetensorError, KeyError):  # not there, or damaged
        found = _extracted([files[place] for place in first], network, batch_size)
        with atomic_write(stored) as partial:
            save_tensors({"features": found}, partial)
    return found[places]


def _extracted(files: Sequence[Path], network: Extractor, batch_size: int) -> NDArray[np.float32]:
    """Return the features [n, d] of image files, in batches of one size."""
    from erase_concept.pipelines.pictures import picture_size

    sizes: dict[tuple[int, int], list[int]] = {}
    for place, file in enumerate(files):
        sizes.setdefault(picture_size(file), []).append(place)
    found: dict[int, NDArray[np.float32]] = {}
    for same in sizes.values():
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            features = network(np.stack([read_image(files[place]) for place in batch]))
            found.update(zip(batch, features, strict=True))
    return np.stack([found[place] for place in range(len(files))])
