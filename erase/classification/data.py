"""What a classifier unlearns with: the split of a data set, the images to forget and to retain, batches of them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.pipelines.classifiers.images import ImageData, Images, read_images
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings

_SALUN = "SalUn, arXiv 2310.12508"
SPLIT = ("train", "validation", "test", "split_seed")  # the settings that say which images are training images


@settings
class DataSettings:
    """The data set, how much of it is used, and how training images are changed at random."""

    source: Annotated[str, described("fashion-mnist, cifar10:DIR, cifar100:DIR, svhn:DIR or folder:DIR.")] = (
        "fashion-mnist"
    )
    train: Annotated[
        int | None, described("Training images, as many of each class; by default all but those of validation.", ge=1)
    ] = None
    validation: Annotated[
        float, described("Share of each class that is kept for choosing settings.", ge=0, lt=1, source=_SALUN)
    ] = 0.1
    test: Annotated[int | None, described("Test images, as many of each class; by default all.", ge=1)] = None
    split_seed: Annotated[int, described("Seed of the split; the original and all that unlearn share it.", ge=0)] = 0
    size: Annotated[int, described("Side in pixels to which the images of folders are scaled.", ge=8)] = 32
    crop: Annotated[
        int, described("Zeros around a training image, of which a random part is cut off.", ge=0, source=_SALUN)
    ] = 4
    flip: Annotated[
        bool | None,
        described("Mirror training images at random; by default where that keeps their class.", source=_SALUN),
    ] = None

    def recorded(self) -> dict[str, object]:
        """Return what a classifier remembers of the images that it learnt from: all but where they are."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


@dataclass(frozen=True, eq=False)
class Split:
    """A data set and the numbers int64 [n] of its training, validation and test images. All are ascending.

    Training and validation images are numbered as the data set's training images, test images as its test images.
    """

    images: ImageData
    train: Tensor
    validation: Tensor
    test: Tensor


def split_data(settings: DataSettings) -> Split:
    """Read a data set and split it, as many images of each class; raises RequestError where it has too few."""
    images = read_images(settings.source, settings.size)
    labels, classes = images.train_labels, len(images.labels)
    generator = stage_generator(settings.split_seed, "split")
    train: list[Tensor] = []
    validation: list[Tensor] = []
    for at in range(classes):
        own = (labels == at).nonzero().squeeze(1)
        own = own[torch.randperm(len(own), generator=generator)]
        kept = (
            len(own)
            if settings.train is None
            else round(_share(settings.train, at, classes) / (1 - settings.validation))
        )
        if kept > len(own):
            raise RequestError("data.train", settings.train, f"{images.name} has {len(own)} of {images.labels[at]!r}")
        held_out = round(kept * settings.validation)
        validation.append(own[:held_out])
        train.append(own[held_out:kept])
    test: list[Tensor] = []
    for at in range(classes):
        own = (images.test_labels == at).nonzero().squeeze(1)
        count = len(own) if settings.test is None else _share(settings.test, at, classes)
        if count > len(own):
            raise RequestError("data.test", settings.test, f"{images.name} has {len(own)} of {images.labels[at]!r}")
        test.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return Split(images, *(torch.cat(rows).sort().values for rows in (train, validation, test)))


def _share(count: int, at: int, classes: int) -> int:
    """Return how many of ``count`` images are of one class."""
    return count // classes + (at < count % classes)


@dataclass(frozen=True, eq=False)
class ForgetRetainImages:
    """Training images, their classes int64 [n], and the numbers int64 of those to forget and to retain.

    ``crop`` and ``flip`` say how ``batch`` changes images at random.
    """

    images: Images
    labels: Tensor
    classes: int
    forget: Tensor
    retain: Tensor
    crop: int = 0
    flip: bool = False

    @property
    def forgotten(self) -> Tensor:
        """Which images, bool [n], are forgotten."""
        marks = torch.zeros(len(self.images), dtype=torch.bool)
        marks[self.forget] = True
        return marks

    def sha256(self) -> str:
        """Return the SHA-256 over the images, their classes, and which are forgotten; see ``Images.sha256``."""
        digest = hashlib.sha256(self.images.sha256().encode())
        for tensor in (self.labels, self.forget, self.retain):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def batch(self, rows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images float32 [n, c, h, w] in [0, 1] and their classes int64 [n]; cropped and mirrored at random.

        Without a generator they are as they are.
        """
        images = self.images[rows]
        if generator is not None:
            images = (
                mirrored(cropped(images, self.crop, generator), generator)
                if self.flip
                else cropped(images, self.crop, generator)
            )
        return images.float() / 255, self.labels[rows]


def cropped(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Return each image [n, c, h, w] moved by at most ``padding`` pixels along each side, zeros behind its edge."""
    if not padding:
        return images
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    down, right = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(n).view(n, 1, 1), :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image [n, c, h, w] as it is, or mirrored from left to right, at random."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def forget_retain(settings: DataSettings, split: Split, forget: Tensor) -> ForgetRetainImages:
    """Return a split's training images, of which these numbers are forgotten and all others retained."""
    retain = split.train[~torch.isin(split.train, forget)]
    flip = not settings.source.startswith("svhn") if settings.flip is None else settings.flip
    images = split.images
    return ForgetRetainImages(
        images.train, images.train_labels, len(images.labels), forget, retain, settings.crop, flip
    )
