"""The training loop: a generator of records, under Accelerate, that can be killed and run again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erase_concept.errors import EraseError
from erase_concept.files import atomic_write
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.model import Diffusion
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings
from erase_concept.training.optimizer import MaskedOptimizer, State

Tensors = tuple[Tensor, ...]
# Given the model and a step's own generator: what the model as it is now predicts for the step.
PrecomputeTargets = Callable[[Diffusion, torch.Generator], Tensors]
# Given the same and what was taught: the loss, and the terms that it is made of, for the log.
Loss = Callable[[Diffusion, torch.Generator, Tensors], tuple[Tensor, dict[str, Tensor]]]
Start = Callable[[Diffusion], object]  # changes the weights, of those that may, where the training is to begin


_SALUN = "SalUn, arXiv 2310.12508"


@settings
class Training:
    """Settings that every trained method has."""

    steps: Annotated[int, described("Training steps.", ge=1, source="ours, near SalUn's five epochs")] = 500
    batch_size: Annotated[int, described("Forget rows in a step, and as many retain rows.", ge=1, source=_SALUN)] = 8
    lr: Annotated[float, described("Learning rate.", ge=0, source=_SALUN)] = 1e-5
    optimizer: Annotated[Literal["adam", "adamw"], described("The optimizer.", source=_SALUN)] = "adam"
    weight_decay: Annotated[float, described("Weight decay; AdamW's is decoupled.", ge=0, source=_SALUN)] = 0.0
    warmup: Annotated[int, described("Steps over which the learning rate rises from zero.", ge=0)] = 0
    decay: Annotated[bool, described("Let the learning rate fall to zero along a cosine.")] = False
    accumulation: Annotated[int, described("Batches whose gradients are averaged in one step.", ge=1)] = 1
    max_grad_norm: Annotated[float | None, described("Clip the gradient to this norm.", gt=0)] = None
    precision: Annotated[Literal["no", "bf16"], described("Precision of the arithmetic; weights stay fp32.")] = "no"
    state: Annotated[State, described("Precision of the optimizer's state.")] = "fp32"
    recompute: Annotated[
        bool, described("Compute activations anew in the backward pass: less memory, a third more time, the same bits.")
    ] = False
    checkpoint_every: Annotated[int, described("Steps from one checkpoint to the next.", ge=1)] = 100

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay and step >= self.warmup:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))
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
    """For how many steps, of all, the base model has made its predictions."""

    step: int
    steps: int


def train(
    model: Diffusion,
    loss: Loss,
    mask: Mask | None,
    settings: Training,
    *,
    seed: int,
    checkpoint: Path | None = None,
    precompute: PrecomputeTargets | None = None,
    start: Start | None = None,
) -> Iterator[Record | TargetProgress]:
    """Minimise a loss over the weights that a mask allows, in place, yielding a record after every step.

    They are the UNet's, all of them without a mask; or the text encoder's, where the mask is one of it.

    Every step draws from a generator of its own, derived from the seed, the step and the process, so a run that goes
    on from its checkpoint ends with the same bits as one that was never stopped. With several processes the gradients
    are averaged. Where nothing else is asked for, the step is taken inside the backward pass, and no gradient outlives
    its parameter's update; accumulation, clipping and several processes need all gradients at once.

    ``precompute`` is called for every step before any weight moves, so a loss can be drawn to what the base model
    predicts without a second model in memory. ``start`` is called once behind that, before the first step, and may
    change the weights that the mask allows. Raises EraseError when the loss is not finite: the weights are then those
    of the last good step, and the checkpoint is kept.
    """
    accelerator = Accelerator(
        cpu=model.device.type == "cpu", gradient_accumulation_steps=settings.accumulation, mixed_precision="no"
    )
    # torch's own autocast: Accelerate's precision is set once for a whole process, and left in the UNet's forward.
    lower = torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    began = time.perf_counter()
    resumed = checkpoint if checkpoint is not None and checkpoint.exists() else None
    first = steps_done(checkpoint)

    def generator(step: int, part: int) -> torch.Generator:
        return stage_generator(seed, "step", step, part, accelerator.process_index)

    changed = "unet" if mask is None else mask.part
    trained: nn.Module = getattr(model, changed)
    taught: dict[tuple[int, int], Tensors] = {}
    if precompute is not None:
        for step in range(first, settings.steps):
            for part in range(settings.accumulation):
                with torch.no_grad(), lower:
                    taught[step, part] = tuple(t.cpu() for t in precompute(model, generator(step, part)))
            yield TargetProgress(step + 1, settings.steps)
    masked = MaskedOptimizer(
        trained,
        mask,
        settings.optimizer,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        state=settings.state,
    )
    if resumed:
        _restore(masked, resumed)
    elif start is not None:
        start(model)
    at_once = settings.accumulation == accelerator.num_processes == 1 and settings.max_grad_norm is None
    prepared = accelerator.prepare(trained)
    wrapped = replace(model, **{changed: prepared})
    if settings.recompute:
        model.unet.enable_gradient_checkpointing()
    try:
        for step in range(first, settings.steps):
            masked.lr = settings.lr_at(step)
            mean, terms = 0.0, dict[str, float]()
            for part in range(settings.accumulation):
                with accelerator.accumulate(prepared):
                    with lower:
                        known = tuple(t.to(model.device) for t in taught.pop((step, part), ()))
                        value, parts = loss(wrapped, generator(step, part), known)
                    mean += accelerator.reduce(value.detach(), "mean").item() / settings.accumulation
                    if not math.isfinite(mean):
                        kept = checkpoint is not None and checkpoint.exists()
                        advice = "lower lr or set max_grad_norm" + (f"; the checkpoint {checkpoint} is kept" * kept)
                        raise EraseError(f"the loss is {mean} at step {step + 1}: {advice}")
                    with masked.in_backward() if at_once else nullcontext():
                        accelerator.backward(value)
                terms = {k: terms.get(k, 0.0) + v.item() / settings.accumulation for k, v in parts.items()}
            if not at_once:
                masked.step()
            seconds = time.perf_counter() - began
            yield Record(step + 1, settings.steps, mean, terms, settings.lr_at(step), seconds)
            # After the yield, so that a step in the checkpoint is always in the caller's log.
            due = step + 1 == settings.steps or (step + 1) % settings.checkpoint_every == 0
            if checkpoint is not None and accelerator.is_main_process and due:
                _save(masked, checkpoint, step + 1)
    finally:
        model.unet.disable_gradient_checkpointing()
        trained.requires_grad_(False)
        for parameter in trained.parameters():
            parameter.grad = None
        accelerator.free_memory()


def _save(masked: MaskedOptimizer, file: Path, step: int) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in masked.state().items()}
    with atomic_write(file) as partial:
        save_file(tensors, partial, {"step": str(step)})


def steps_done(checkpoint: Path | None) -> int:
    """Return how many steps a run's checkpoint has behind it: none when there is no such file."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    with safe_open(checkpoint, "pt") as tensors:
        return int(tensors.metadata()["step"])


def _restore(masked: MaskedOptimizer, file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        masked.restore({name: tensors.get_tensor(name) for name in tensors.keys()})
