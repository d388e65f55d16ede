"""Epochs over the images to forget and to retain, on top of the training loop that all models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from erase_concept.classification.data import ForgetRetainImages
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.classifiers.classifier import BatchNormPolicy, Classifier
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings
from erase_concept.training.health import watched_weights
from erase_concept.training.loop import ANOTHER_FOLDER, Record, Start, TargetProgress, Tensors, Training, train

_SALUN = "SalUn, arXiv 2310.12508"
Events = Iterator[Record | TargetProgress]


@settings
class ClassifierTraining:
    """Settings that every trained method has."""

    epochs: Annotated[int, described("Passes over the images.", ge=1, source=_SALUN)] = 10
    batch_size: Annotated[int, described("Images in a step.", ge=1, source=_SALUN)] = 256
    lr: Annotated[float, described("Learning rate.", ge=0, source=_SALUN)] = 0.01
    optimizer: Annotated[Literal["sgd", "adam"], described("The optimizer.", source=_SALUN)] = "sgd"
    momentum: Annotated[float, described("SGD's momentum.", ge=0, lt=1, source=_SALUN)] = 0.9
    weight_decay: Annotated[float, described("Weight decay.", ge=0, source=_SALUN)] = 5e-4
    milestones: Annotated[
        tuple[int, ...], described("Epochs, from 0, before which the learning rate falls to a tenth.")
    ] = ()
    cosine: Annotated[bool, described("Let the learning rate fall to zero along a cosine.")] = False
    batch_norm: Annotated[
        BatchNormPolicy,
        described("Whether steps move BatchNorm's running statistics, which no mask freezes.", source=_SALUN),
    ] = "update"
    accumulation: Annotated[
        int, described("Parts of a batch, one after the other in memory; several processes share them.", ge=1)
    ] = 1
    checkpoint_every: Annotated[int, described("Steps from one checkpoint to the next.", ge=1)] = 200
    max_loss_growth: Annotated[
        float, described("Stop when the loss is so many times that of the first ten steps; 0: never.", ge=0)
    ] = 100.0


@settings
class _LoopSettings(Training):
    """The loop's settings, with steps at which the learning rate falls."""

    drops: Annotated[tuple[int, ...], described("Steps, from 0, at which the learning rate falls to a tenth.")] = ()

    def calmer(self) -> str:
        """Return which settings to change where the loss explodes: a classifier's gradient cannot be clipped."""
        return "lower lr"

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return Training.lr_at(self, step) * 0.1 ** sum(step >= drop for drop in self.drops)

    def told(self, step: int, batch: int) -> Tensors:
        """Return the two numbers, from which a loss finds its images: int64 [2]."""
        return (torch.tensor([step, batch]),)


@dataclass(frozen=True, eq=False)
class Part:
    """A part of an epoch: its name, the numbers of its images int64 [n], and how many of them are in a step."""

    name: Literal["forget", "retain", "mixed"]
    rows: Tensor
    batch_size: int


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step learns from.

    ``images`` float32 [n, c, h, w] in [0, 1], cropped and mirrored at random, their ``labels`` int64 [n], and which are
    forgotten, bool [n]: all on the model's device. ``part`` is the name of the epoch's part.
    """

    epoch: int
    part: str
    images: Tensor
    labels: Tensor
    forgotten: Tensor


# Computes a step's loss from the model, the batch and the step's own generator.
BatchLoss = Callable[[Classifier, Batch, torch.Generator], Tensor]


class Schedule:
    """The batches of all epochs. Each epoch goes through its parts in order, and through a part's images in a new one.

    ``parts`` returns those of an epoch, counted from 0. ``seed`` and the epoch give the order, so that a training can
    begin anywhere.
    """

    def __init__(self, epochs: int, parts: Callable[[int], Sequence[Part]], seed: int) -> None:
        """Lay out all steps."""
        self.seed = seed
        self.steps: list[tuple[int, Part, int]] = []
        self.first: list[int] = []  # each epoch's first step
        for epoch in range(epochs):
            self.first.append(len(self.steps))
            for part in parts(epoch):
                self.steps += [(epoch, part, start) for start in range(0, len(part.rows), part.batch_size)]

    def __len__(self) -> int:
        return len(self.steps)

    def rows(self, step: int) -> tuple[int, str, Tensor]:
        """Return a step's epoch, the name of its part, and the numbers of its images."""
        epoch, part, start = self.steps[step]
        order = torch.randperm(len(part.rows), generator=stage_generator(self.seed, "epoch", epoch, part.name))
        return epoch, part.name, part.rows[order[start : start + part.batch_size]]


def train_epochs(
    model: Classifier,
    data: ForgetRetainImages,
    loss: BatchLoss,
    schedule: Schedule,
    mask: Mask | None,
    settings: ClassifierTraining,
    *,
    checkpoint: Path | None = None,
    start: Start[Classifier] | None = None,
) -> Events:
    """Minimise a loss over a schedule's batches and a mask's weights, in place, yielding a record after every step.

    It is ``train`` with the images of each step; seeds, checkpoints and errors are the same. Raises EraseError too when
    the steps change no weight.
    """
    forgotten, pieces = data.forgotten, settings.accumulation

    def numbered(model: Classifier, generator: torch.Generator, place: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        step, piece = place[0].tolist()
        epoch, part, whole = schedule.rows(step)
        rows = whole.tensor_split(pieces)[piece]
        # Pieces count by their images. One without any, of an epoch's last batch, shows an image that counts nothing.
        weight, rows = len(rows) * pieces / len(whole), rows if len(rows) else whole[:1]
        images, labels = data.batch(rows, generator)
        device = model.device
        batch = Batch(epoch, part, images.to(device), labels.to(device), forgotten[rows].to(device))
        value = loss(model, batch, generator) * weight
        return value, {part: value.detach()}

    looped = _loop_settings(settings, schedule)
    model = replace(model, batch_norm=settings.batch_norm)
    events = train(model, numbered, mask, looped, seed=schedule.seed, checkpoint=checkpoint, start=start)
    yield from watched_weights(events, model.network, "" if checkpoint is None else ANOTHER_FOLDER)


def _loop_settings(settings: ClassifierTraining, schedule: Schedule) -> _LoopSettings:
    return _LoopSettings(
        steps=len(schedule),
        batch_size=settings.batch_size,
        lr=settings.lr,
        optimizer=settings.optimizer,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        accumulation=settings.accumulation,
        decay=settings.cosine,
        checkpoint_every=settings.checkpoint_every,
        drops=tuple(schedule.first[epoch] for epoch in settings.milestones if epoch < len(schedule.first)),
    )
