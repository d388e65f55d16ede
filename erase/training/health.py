"""The health of a training: an exploding loss, a mask that lets nothing change, retained prompts that collapse.

Each ends the run before a checkpoint of such a step, with one line on what to do. The loop itself ends for a loss that
is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, nn

from erase_concept.data import ForgetRetain
from erase_concept.errors import EraseError
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.processes import total
from erase_concept.seed import stage_generator
from erase_concept.training.loop import ANOTHER_FOLDER, Record, TargetProgress, Training
from erase_concept.training.shards import is_sharded, local

ROWS = 4  # retained rows that are looked at
_DEAD = 2  # looks at which nothing has changed; one is no proof, for a method may put weights back for a while
LOOK_EVERY = 10  # steps of a classifier, until a weight has changed
FIRST = 10  # steps whose losses the later ones are measured by
_TIMES = (0.2, 0.4, 0.6, 0.8)  # of the time steps, one for each row

Events = Iterator[Record | TargetProgress]


def watched(
    events: Events,
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: Any,
    losses: Sequence[float] = (),
) -> Events:
    """Yield a method's events, and stop where its training has gone wrong.

    ``losses`` are those of steps that an earlier process took. Every ``probe_every`` steps, and before each checkpoint,
    the model predicts for some retained rows. Nothing here draws from a generator of the training or changes a weight.

    Raises EraseError when a loss has grown beyond ``max_loss_growth`` times the largest before it of the first steps
    (or 1, where that is larger), when the predictions for retained rows have moved from the base model's by more than
    ``max_retain_change`` of their norm, and when no weight has changed at two looks. The checkpoint of such a step is
    not written.
    """
    if not isinstance(settings, Training):  # a closed form
        yield from events
        return
    first = list(losses[:FIRST])
    probe = _Probe(model, data, mask) if settings.probe_every else None
    with closing(cast(Any, events)):  # so that the training tidies up after itself at once
        for event in events:
            if isinstance(event, Record):
                _check_loss(event, first, settings.max_loss_growth, settings.calmer())
                due = event.step == event.steps or event.step % settings.checkpoint_every == 0
                if probe is not None and (due or event.step % settings.probe_every == 0):
                    probe.check(event, settings.max_retain_change)
            yield event


def watched_losses(events: Events, growth: float, losses: Sequence[float] = ()) -> Events:
    """Yield a classifier's events, and raise EraseError when its loss has grown too far, as in ``watched``.

    A loss below zero is one that a method raises on purpose, such as gradient ascent, and has no bound.
    """
    first = [loss for loss in losses[:FIRST] if loss >= 0]
    with closing(cast(Any, events)):
        for event in events:
            if isinstance(event, Record) and event.loss >= 0:
                _check_loss(event, first, growth, "lower lr")
            yield event


def watched_weights(events: Events, network: nn.Module, more: str = ANOTHER_FOLDER) -> Events:
    """Yield a classifier's events, and raise EraseError when no weight has changed at two looks.

    They are compared with the weights after the first step, for a training may begin with new ones. ``more`` ends the
    advice.
    """
    unchanged: int | None = 0
    first = base = 0
    with closing(cast(Any, events)):
        for event in events:
            if isinstance(event, Record) and unchanged is not None:
                if not first:
                    first, base = event.step, _sum_of_bits(network)
                elif event.step % LOOK_EVERY == 0:
                    unchanged = unchanged + 1 if _sum_of_bits(network) == base else None
                if unchanged == _DEAD:
                    found = f"no weight has changed from step {first} to step {event.step}"
                    advice = "raise lr, or choose a mask with weights that the loss depends on"
                    raise EraseError(f"{found}: {advice}{more}", of_all=True)
            yield event


def _check_loss(event: Record, first: list[float], growth: float, advice: str) -> None:
    """Compare a loss with the first ones before it, to which it is added while they are few."""
    limit = growth * max(1.0, *map(abs, first)) if first else 0.0
    if len(first) < FIRST:
        first.append(event.loss)
    if limit and abs(event.loss) > limit:
        found = f"the loss is {event.loss:.4g} at step {event.step}, more than {growth:g} times that of the first steps"
        raise EraseError(f"{found}: {advice}{ANOTHER_FOLDER}", of_all=True)


class _Probe:
    """Looks at a few retained rows, or where there are none at noise, with fixed noise and time steps."""

    def __init__(self, model: Diffusion, data: ForgetRetain, mask: Mask | None) -> None:
        """Keep the base model's predictions, and a sum over the bits of the weights that are trained."""
        generator = stage_generator(0, "health")
        latents = data.retain_latents[:ROWS]
        which = data.retain_which[:ROWS]
        prompts = data.retain[which] if len(latents) else (data.retain if len(data.retain) else data.uncond)[:ROWS]
        noise = torch.randn(len(prompts), *data.retain_latents.shape[1:], generator=generator)
        every = int(model.scheduler.config.num_train_timesteps)
        timesteps = torch.tensor([int(share * every) for share in _TIMES[: len(prompts)]])
        moved = [one.to(model.device) for one in (latents, noise, timesteps, prompts)]
        noisy = model.add_noise(moved[0], moved[1], moved[2]) if len(latents) else moved[1]
        self.model, self.rows = model, (noisy, moved[2], moved[3])
        self.trained: nn.Module = getattr(model, model.part_of(() if mask is None else mask.shapes))
        self.base, self.sum = self._predicted(), _sum_of_bits(self.trained)
        self.unchanged: int | None = 0  # looks at which nothing had changed; None once anything has

    @torch.no_grad()
    def _predicted(self) -> Tensor:
        # One row at a time, so that a look takes no more memory than a step.
        rows = zip(*(part.split(1) for part in self.rows), strict=True)
        return torch.cat([self.model.predict(*row).float().cpu() for row in rows])

    def check(self, event: Record, limit: float) -> None:
        """Raise EraseError where nothing has changed yet, or too much for the retained rows."""
        now = self._predicted()
        if self.unchanged is not None:
            same = torch.equal(now, self.base) and _sum_of_bits(self.trained) == self.sum
            self.unchanged = self.unchanged + 1 if same else None
        if self.unchanged == _DEAD:
            found = f"no weight has changed in {event.step} steps"
            advice = "raise lr, or choose a mask or scope with weights that the loss depends on"
            raise EraseError(f"{found}: {advice}{ANOTHER_FOLDER}", of_all=True)
        change = float((now - self.base).norm() / self.base.norm().clamp(min=1e-12))
        if limit and not change <= limit:  # NaN is no number that is below it
            found = f"predictions for retained prompts differ from the base model's by {change:.0%} of their norm"
            advice = "lower lr or steps, or give what is retained more weight"
            raise EraseError(f"{found} at step {event.step}: {advice}{ANOTHER_FOLDER}", of_all=True)


def _sum_of_bits(module: nn.Module) -> int:
    """Return the sum of all weights' bits, each weight's taken as a whole number: it changes with nearly any change.

    Where weights are sharded, every process has to call it.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = list(module.parameters())
    own = [local(p.detach()).contiguous() for p in parameters]
    bits = sum(int(p.view(kinds[p.itemsize]).sum(dtype=torch.int64)) for p in own)
    return total(bits) if any(is_sharded(p) for p in parameters) else bits
