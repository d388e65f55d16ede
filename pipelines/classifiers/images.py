"""Labelled images: Fashion-MNIST, CIFAR-10, CIFAR-100, SVHN, a folder for each class, or what a built-in model draws.

Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from erase_concept.errors import RequestError, did_you_mean, first_line
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.classifiers.classifier import Normalisation
from erase_concept.pipelines.pictures import opened

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MOST_BYTES = 1 << 29  # of one file of Fashion-MNIST, which has 47 million
_SAMPLED = 2000  # images that the normalisation is measured on


class Images(Protocol):
    """Images by number: uint8 [c, h, w] each."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the images of numbers int64 [n] as uint8 [n, c, h, w]."""

    def sha256(self) -> str:
        """Return a hash by which other images are told: over all bytes, or the names and sizes of files."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images that are in memory, uint8 [n, c, h, w]."""

    images: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.images[rows]

    def sha256(self) -> str:
        """Return the SHA-256 over their bytes."""
        return hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()


@dataclass(frozen=True, eq=False)
class OnDisk:
    """Image files, read as RGB when they are asked for, cropped to a square and scaled to a side."""

    files: tuple[Path, ...]
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return (3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Tensor) -> Tensor:
        from PIL import ImageOps

        found = []
        for row in rows.tolist():
            with opened(self.files[row], "data.source") as image:
                square = ImageOps.fit(image.convert("RGB"), (self.size, self.size))
            found.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        return torch.stack(found)

    def sha256(self) -> str:
        """Return the SHA-256 over the files' names and sizes: to read all of them could take as long as an epoch."""
        told = "".join(f"{file.parent.name}/{file.name} {file.stat().st_size}\n" for file in self.files)
        return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: training and test images, their classes int64 [n], and the classes' labels."""

    name: str
    train: Images
    train_labels: Tensor
    test: Images
    test_labels: Tensor
    labels: tuple[str, ...]

    @cached_property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of the training images' channels, in [0, 1], over at most 2,000 of them."""
        count = len(self.train)
        images = self.train[torch.arange(0, count, max(1, count // _SAMPLED))].double() / 255
        mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp(min=1e-3)
        return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))


def read_images(source: str, size: int = 32) -> ImageData:
    """Read a data set: ``fashion-mnist``, ``cifar10:DIR``, ``cifar100:DIR``, ``svhn:DIR`` or ``folder:DIR``.

    The name of a built-in model stands for images of what it draws. Each may name the folder of its files. An image
    folder holds ``train`` and ``test``, with a folder of images for each class in both; ``size`` is the side to which
    its images are scaled. Raises RequestError when files are missing.
    """
    name, _, folder = source.partition(":")
    builtin = {model.name: model.images for model in builtin_models().values() if model.images}
    known = (*SETS, *builtin)
    if name not in known:
        allowed = f"{did_you_mean(name, known)}allowed: {', '.join(known)}, each with :DIR"
        raise RequestError("data.source", source, allowed)
    if not folder and name != "fashion-mnist":
        raise RequestError("data.source", source, f"needs the folder of its files: {name}:DIR")
    where = Path(folder) if folder else FASHION_MNIST
    if not where.is_dir():
        how = "; Debian has it in the package dataset-fashion-mnist, or say fashion-mnist:DIR" if not folder else ""
        raise RequestError("data.source", source, f"there is no folder {where}{how}")
    read: Callable[[str, Path, int], ImageData] = (
        SETS[name] if name in SETS else importlib.import_module(builtin[name]).read
    )
    return read(source, where, size)


def _fashion_mnist(source: str, folder: Path, _: int) -> ImageData:
    parts: list[Any] = []
    for part in ("train", "t10k"):
        images, labels = (_idx(source, folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        if len(images) != len(labels):
            raise RequestError(
                "data.source", source, f"{folder} has {len(images)} images and {len(labels)} labels of {part}"
            )
        parts += [InMemory(torch.from_numpy(images)[:, None]), torch.from_numpy(labels).long()]
    return ImageData("fashion-mnist", parts[0], parts[1], parts[2], parts[3], _FASHION)


def _idx(source: str, file: Path) -> np.ndarray:
    """Read a file in the format IDX: two zeros, type 8 (bytes), rank, the sizes as big-endian int32, the bytes."""
    try:
        with gzip.open(file, "rb") as stream:
            rank = min(stream.read(4)[3], 4)
            shape = np.frombuffer(stream.read(4 * rank), ">i4").tolist()
            if len(shape) != rank or min(shape) < 0 or math.prod(shape) > _MOST_BYTES:
                raise ValueError(f"it holds no images or labels: {shape}")
            content = stream.read(math.prod(shape) + 1)  # no more, however much it unpacks to
        return np.frombuffer(content, np.uint8).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as problem:
        raise RequestError("data.source", source, f"{file} is missing or damaged: {first_line(problem)}") from None


def _torchvision(name: str) -> Callable[[str, Path, int], ImageData]:
    def read(source: str, folder: Path, _: int) -> ImageData:
        from torchvision import datasets

        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "svhn": datasets.SVHN}[name]
        splits = ("train", "test") if name == "svhn" else (True, False)
        try:
            train, test = (kind(str(folder), split) for split in splits)
        except (RuntimeError, OSError, ImportError) as problem:
            raise RequestError(
                "data.source", source, f"{folder} does not hold the files that torchvision reads: {_reason(problem)}"
            ) from None
        parts: list[Any] = []
        for one in (train, test):
            images = torch.from_numpy(np.ascontiguousarray(one.data))
            images = images if name == "svhn" else images.permute(0, 3, 1, 2).contiguous()
            parts += [InMemory(images), torch.tensor(np.asarray(one.labels if name == "svhn" else one.targets)).long()]
        labels = tuple(map(str, range(10))) if name == "svhn" else tuple(train.classes)
        return ImageData(name, parts[0], parts[1], parts[2], parts[3], labels)

    return read


def _reason(problem: BaseException) -> str:
    """Return why a data set cannot be read, without the advice to download it."""
    return first_line(problem).partition(" You can use download")[0]


def _folder(source: str, folder: Path, size: int) -> ImageData:
    labels = tuple(sorted(one.name for one in folder.glob("train/*") if one.is_dir()))
    if len(labels) < 2:
        raise RequestError(
            "data.source", source, f"{folder / 'train'} needs a folder of images for each of two classes or more"
        )
    parts: list[Any] = []
    for part in ("train", "test"):
        files = [(file, at) for at, label in enumerate(labels) for file in sorted((folder / part / label).glob("*"))]
        files = [(file, at) for file, at in files if file.suffix.lower() in _SUFFIXES]
        without = [label for at, label in enumerate(labels) if at not in {at for _, at in files}]
        if without:
            raise RequestError("data.source", source, f"{folder / part} has no image of {without[0]!r}")
        parts += [OnDisk(tuple(file for file, _ in files), size), torch.tensor([at for _, at in files])]
    return ImageData(folder.name, parts[0], parts[1], parts[2], parts[3], labels)


SETS: dict[str, Callable[[str, Path, int], ImageData]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": _torchvision("cifar10"),
    "cifar100": _torchvision("cifar100"),
    "svhn": _torchvision("svhn"),
    "folder": _folder,
}
