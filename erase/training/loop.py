"""The training loop: a generator of records, under Accelerate, that can be killed and run again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from typing_extensions import Self

from erase_concept.errors import EraseError, RequestError
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.processes import from_main, gathered, processes
from erase_concept.pipelines.signals import finish_first
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings
from erase_concept.training.checkpoint import processes_of, restore, save_checkpoint, steps_done
from erase_concept.training.optimizer import MaskedOptimizer
from erase_concept.training.rules import SGD, Adam, State
from erase_concept.training.shards import sharded, sharding
from erase_concept.training.shared import DDP_SETTINGS, LossOf, shared


class Trainable(Protocol):
    """What the loop asks of a model: a diffusion model, a classifier."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    def part_of(self, weights: Collection[str]) -> str:
        """Return the component that has weights of these names; of none, the one that is trained by default."""

    def in_training(self, *, recompute: bool) -> AbstractContextManager[None]:
        """Put the model into the state in which it is trained, and back when the context ends."""


_M = TypeVar("_M", bound=Trainable)
Tensors = tuple[Tensor, ...]
# Computes a step's fixed targets with the current model, before the training. The generator is the step's own.
PrecomputeTargets = Callable[[_M, torch.Generator], Tensors]
# Computes a step's loss, and its terms for the log, from the model, the step's generator and the precomputed targets.
Loss = Callable[[_M, torch.Generator, Tensors], tuple[Tensor, dict[str, Tensor]]]
Start = Callable[[_M], object]  # changes weights that the mask allows, before the first step


ANOTHER_FOLDER = ", and choose another folder"  # for other settings: a run's folder refuses them
_SALUN = "SalUn, arXiv 2310.12508"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@settings
class Training:
    """Settings that every trained method has."""

    steps: Annotated[int, described("Training steps.", ge=1, source="ours, near SalUn's five epochs")] = 500
    epochs: Annotated[
        int | None,
        described("Passes over the rows of the concept (or of the anchor), in the place of steps.", ge=1),
    ] = None
    batch_size: Annotated[int, described("Forget rows in a step, and as many retain rows.", ge=1, source=_SALUN)] = 8
    lr: Annotated[float, described("Learning rate.", ge=0, source=_SALUN)] = 1e-5
    optimizer: Annotated[Literal["adam", "adamw", "sgd"], described("The optimizer.", source=_SALUN)] = "adam"
    momentum: Annotated[float, described("SGD's momentum; Adam has none of it.", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, described("Weight decay; AdamW's is decoupled.", ge=0, source=_SALUN)] = 0.0
    warmup: Annotated[int, described("Steps over which the learning rate rises from zero.", ge=0)] = 0
    decay: Annotated[bool, described("Let the learning rate fall to zero along a cosine.")] = False
    cycles: Annotated[int, described("Times that it falls, each from the top, where it falls.", ge=1)] = 1
    accumulation: Annotated[
        int, described("Batches whose gradients are averaged in one step; several processes share them.", ge=1)
    ] = 1
    max_grad_norm: Annotated[float | None, described("Clip the gradient to this norm.", gt=0)] = None
    precision: Annotated[Literal["no", "bf16"], described("Precision of the arithmetic of fp32 weights.")] = "no"
    weights: Annotated[
        Literal["fp32", "bf16"],
        described("Precision of the UNet's weights in training; bf16 is also the arithmetic's, and rounds at random."),
    ] = "fp32"
    state: Annotated[State, described("Precision of the optimizer's state.")] = "fp32"
    recompute: Annotated[
        bool, described("Compute activations anew in the backward pass: less memory, a third more time, the same bits.")
    ] = False
    checkpoint_every: Annotated[int, described("Steps from one checkpoint to the next.", ge=1)] = 100
    probe_every: Annotated[
        int,
        described("Steps from one look at retained prompts to the next, and before each checkpoint; 0: none.", ge=0),
    ] = 50
    max_retain_change: Annotated[
        float,
        described("Stop when predictions for retained prompts differ from the base's by this share; 0: never.", ge=0),
    ] = 1.0
    max_loss_growth: Annotated[
        float, described("Stop when the loss is so many times that of the first ten steps; 0: never.", ge=0)
    ] = 100.0

    def epoch_steps(self, rows: int) -> int:
        """Return the steps of one pass over so many rows; the last step of a pass may have fewer."""
        return math.ceil(rows / (self.batch_size * self.accumulation))

    def resolved(self, rows: int) -> Self:
        """Return the settings with steps in the place of epochs, for so many rows in an epoch."""
        if self.epochs is None:
            return self
        return replace(self, steps=self.epochs * self.epoch_steps(rows), epochs=None)

    def can_resume_after(self, step: int) -> bool:
        """Tell whether a run can go on from a step, counted from 1, with weights and moments alone."""
        return True

    def checkpoint_due(self, step: int, *, interrupted: bool) -> bool:
        """Tell whether a checkpoint is written after a step, counted from 1."""
        regular = step == self.steps or step % self.checkpoint_every == 0
        return regular or (interrupted and self.can_resume_after(step))

    def logged_steps(self, concepts: int) -> int | None:
        """Return how many steps the log of a run that erases so many concepts has; None where the data tell as well."""
        return self.steps

    def told(self, step: int, batch: int) -> Tensors:
        """Return what a loss is told of its batch, whose number and its step's count from 0, beside its targets."""
        return ()

    def calmer(self) -> str:
        """Return which settings to change where the loss explodes."""
        return "lower lr or set max_grad_norm" if self.max_grad_norm is None else "lower lr or max_grad_norm"

    def rule(self) -> Adam | SGD:
        """Return the optimizer's settings."""
        if self.optimizer == "sgd":
            return SGD(self.lr, self.momentum, self.weight_decay, self.max_grad_norm)
        return Adam(self.lr, self.optimizer, (0.9, 0.999), 1e-8, self.weight_decay, self.max_grad_norm, self.state)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay and step >= self.warmup:
            length = self.steps - self.warmup
            rate *= 0.5 * (1 + math.cos(math.pi * (self.cycles * (step - self.warmup) % length) / length))
        return rate


@dataclass(frozen=True)
class Record:
    """One line of the log: step (from 1) of steps, loss, its terms, learning rate, seconds since the start."""

    step: int
    steps: int
    loss: float
    terms: dict[str, float]
    lr: float
    seconds: float


@dataclass(frozen=True)
class TargetProgress:
    """Progress of precomputing the base model's targets: steps that have theirs, of all steps."""

    step: int
    steps: int


def train(
    model: _M,
    loss: Loss[_M],
    mask: Mask | None,
    settings: Training,
    *,
    seed: int,
    checkpoint: Path | None = None,
    precompute: PrecomputeTargets[_M] | None = None,
    start: Start[_M] | None = None,
) -> Iterator[Record | TargetProgress]:
    """Minimise a loss over the weights that a mask allows, in place, yielding a record after every step.

    Without a mask these are all weights of the model's main component, such as the UNet.

    Every batch draws from a generator of its own, derived from the seed, the step and its number in the step, so a run
    that goes on from its checkpoint ends with the same bits as one that was never stopped. Several processes share the
    batches of a step and average their gradients: the training is that of one process, but for rounding. The step is
    taken inside the backward pass; only accumulation and clipping need all gradients at once.

    ``precompute`` is called for every step before any weight changes, so that the base model's predictions can be
    targets without a second model in memory. ``start`` is called after that, before the first step. Raises EraseError
    when the loss is not finite: the weights are then those of the last good step, and the checkpoint is kept; and when
    a signal, which ends the training after the step with a checkpoint, reached another process. Raises RequestError
    when the processes cannot share a step's batches evenly, or when the checkpoint is another training's or was made by
    another number of processes.
    """
    count = processes().num_processes
    check_shares(settings, count)
    accelerator = _accelerator(model.device, settings.accumulation // count)
    began, first = time.perf_counter(), from_main(lambda: _steps_behind(checkpoint, count, settings.steps))
    trained = _trained(model, model.part_of(() if mask is None else mask.shapes), settings)
    targets: dict[tuple[int, int], Tensors] = {}
    generators = _Generators(seed)
    if precompute is not None:
        for step in range(first, settings.steps):
            targets |= _targets(model, precompute, settings, generators, step)
            yield TargetProgress(step + 1, settings.steps)
    if not first and start is not None:
        start(model)
    training, shards = model.in_training(recompute=settings.recompute), sharded(accelerator, trained)
    with training, shards, _tidied(accelerator, trained), finish_first() as interrupted:
        masked = MaskedOptimizer(trained, mask, settings.rule())
        if first and checkpoint is not None:
            restore(masked, checkpoint)
        loss_of = shared(accelerator, LossOf(trained, partial(loss, model)), masked)
        steps = _Steps(accelerator, loss_of, masked, model.device, settings, generators, targets)
        for step in range(first, settings.steps):
            mean, terms = steps.take(step, checkpoint)
            yield Record(step + 1, settings.steps, mean, terms, settings.lr_at(step), time.perf_counter() - began)
            stopping = _any_of(interrupted(), count)
            if checkpoint is not None and settings.checkpoint_due(step + 1, interrupted=stopping):
                # After the yield, so that a step in the checkpoint is always in the caller's log.
                _save(masked, checkpoint, step + 1, count)
            if stopping:
                break
        else:
            return
    # The process that heard it has ended above. Nobody may take what is there for a whole training.
    raise EraseError(f"the training was stopped after step {step + 1} of {settings.steps}; the same command goes on")


def _save(optimizer: MaskedOptimizer, checkpoint: Path, steps: int, count: int) -> None:
    state = optimizer.state()  # every process has to ask: weights in shards are gathered
    if processes().is_main_process:
        save_checkpoint(checkpoint, state, steps, count)


def _any_of(interrupted: bool, count: int) -> bool:
    """Tell whether one of so many processes was told to stop, which each of them hears at another time."""
    return any(gathered(interrupted)) if count > 1 else interrupted


def _accelerator(device: torch.device, batches: int) -> Accelerator:
    """Return Accelerate's engine for training in fp32 with so many batches of this process in a step."""
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        # Of weights in shards no process keeps whole gradients from one batch to the next.
        gradient_accumulation_plugin=GradientAccumulationPlugin(batches, sync_each_batch=sharding() is not None),
        kwargs_handlers=[DDP_SETTINGS],
    )


@contextmanager
def _tidied(accelerator: Accelerator, trained: nn.Module) -> Iterator[None]:
    """Leave no gradients behind when the context ends."""
    try:
        yield
    finally:
        for p in trained.parameters():
            p.requires_grad_(False)
            p.grad = None
        if accelerator.device.type != "cpu":  # there it would only collect garbage, which takes most of a second
            accelerator.free_memory()


def check_shares(settings: Training, count: int) -> None:
    """Raise RequestError when so many processes cannot share the batches of a step evenly."""
    if settings.accumulation % count:
        rows = settings.batch_size * settings.accumulation
        example = f", such as {count} with batch_size {max(1, rows // count)} for about the same rows in a step"
        allowed = f"{count} processes share the batches of a step; allowed: a multiple of {count}{example}"
        raise RequestError("settings.accumulation", settings.accumulation, allowed)


def _steps_behind(checkpoint: Path | None, count: int, total: int) -> int:
    """Return how many of a training's steps a checkpoint has behind it; refuse that of another training."""
    steps = steps_done(checkpoint)
    if steps and checkpoint is not None and (made := processes_of(checkpoint)) != count:
        allowed = f"the training in {checkpoint} was begun with {made}, and goes on with as many"
        raise RequestError("processes", count, allowed)
    if steps > total:
        allowed = f"has {steps} steps behind it, and this training {total} in all; delete it to train from the start"
        raise RequestError("checkpoint", checkpoint, allowed)
    return steps


def own_batches(settings: Training) -> range:
    """Return the numbers of this process's batches of a step."""
    return range(processes().process_index, settings.accumulation, processes().num_processes)


@torch.no_grad()
def _targets(
    model: _M, precompute: PrecomputeTargets[_M], settings: Training, generators: _Generators, step: int
) -> dict[tuple[int, int], Tensors]:
    """Compute the targets of each batch of a step, in main memory."""
    found: dict[tuple[int, int], Tensors] = {}
    for batch in own_batches(settings):
        with _autocast(model.device, settings):
            targets = precompute(model, generators.of(step, batch))
        found[step, batch] = tuple(target.cpu() for target in targets)
    return found


def _trained(model: Trainable, part: str, settings: Training) -> nn.Module:
    """Return the part that is trained; raises ValueError for weights in another precision than the settings say."""
    trained: nn.Module = getattr(model, part)
    found = {p.dtype for p in trained.parameters()}
    if found != {_DTYPES[settings.weights]}:
        raise ValueError(f"weights must be {settings.weights}, as the settings say, and are {found}")
    return trained


def _autocast(device: torch.device, settings: Training) -> torch.autocast:
    """Return torch's own autocast: Accelerate's is set once for a whole process, and stays in the UNet's forward."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


@dataclass(frozen=True)
class _Generators:
    """Makes the generator of each batch of each step."""

    seed: int

    def of(self, step: int, batch: int) -> torch.Generator:
        # The words must never change, the last one neither: every erased model would have other weights.
        return stage_generator(self.seed, "step", step, batch, 0)


@dataclass(frozen=True)
class _Steps:
    """Takes the steps of a training."""

    accelerator: Accelerator
    loss: nn.Module
    masked: MaskedOptimizer
    device: torch.device
    settings: Training
    generators: _Generators
    targets: dict[tuple[int, int], Tensors]

    @property
    def in_backward(self) -> bool:
        """Whether a step can be taken inside its backward pass."""
        return self.settings.accumulation == 1 and self.settings.max_grad_norm is None

    def take(self, step: int, checkpoint: Path | None) -> tuple[float, dict[str, float]]:
        """Take a step, and return the loss and its terms."""
        settings, accelerator = self.settings, self.accelerator
        self.masked.lr = settings.lr_at(step)
        mean, terms = 0.0, dict[str, float]()
        mine = own_batches(settings)
        for batch in mine:
            with accelerator.accumulate(self.loss):
                with _autocast(self.device, settings):
                    given = (*settings.told(step, batch), *self.targets.pop((step, batch), ()))
                    targets = tuple(tensor.to(self.device) for tensor in given)
                    value, parts = self.loss(self.generators.of(step, batch), targets)
                mean += accelerator.reduce(value.detach(), "mean").item() / len(mine)
                if not math.isfinite(mean):
                    advice = settings.calmer() + ("" if checkpoint is None else ANOTHER_FOLDER)
                    raise EraseError(f"the loss is {mean} at step {step + 1}: {advice}", of_all=True)
                with self.masked.in_backward() if self.in_backward else nullcontext():
                    accelerator.backward(value)
            terms = {k: terms.get(k, 0.0) + v.item() / len(mine) for k, v in parts.items()}
        if not self.in_backward:
            self.masked.step()
        return mean, terms
