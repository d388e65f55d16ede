"""Train a module: AdamW with a schedule, averaged weights, and a checkpoint from which a killed training goes on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How a part is trained: AdamW's steps, learning rate and betas, and the decay of the averaged weights (EMA).

    The learning rate warms up for 100 steps, stays up to the share ``flat`` of the steps, and falls to zero along a
    cosine.
    """

    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.995
    flat: float = 0.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        progress = max(0.0, (step - self.flat * self.steps) / (self.steps - self.flat * self.steps))
        return self.lr * (min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss: Callable[[np.random.Generator], Tensor],
    work: Path,
    schedule: Schedule,
    *,
    seed: int,
) -> dict[str, Any]:
    """Train modules and return their averaged copies; resumes from ``work/<name>.pt``.

    ``loss`` gets the step's own random generator, and torch's is seeded for the step, so a resumed run draws what the
    whole run would have drawn. Buffers, such as BatchNorm's statistics, are not averaged but copied.
    """
    checkpoint = work / f"{name}.pt"
    ema = {key: copy.deepcopy(module).requires_grad_(False) for key, module in modules.items()}
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=schedule.betas, weight_decay=1e-4, fused=True)
    start, seconds = _resume(checkpoint, modules, ema, optimizer) if checkpoint.exists() else (0, 0.0)
    began, mean, steps = time.perf_counter() - seconds, 0.0, schedule.steps
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        torch.manual_seed(seed + step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        value = loss(rng)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(schedule.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, module in modules.items():
                torch._foreach_lerp_(list(ema[key].parameters()), list(module.parameters()), 1 - decay)
                for kept, buffer in zip(ema[key].buffers(), module.buffers(), strict=True):
                    kept.copy_(buffer)
        mean += (value.item() - mean) * max(0.01, 1 / (step + 1 - start))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            elapsed = time.perf_counter() - began
            print(f"{name} {step + 1}/{steps} loss {mean:.4f} {elapsed:.0f} s", flush=True)
            if (step + 1) % 500 == 0 or step + 1 == steps:
                state = {
                    "modules": {key: module.state_dict() for key, module in modules.items()},
                    "ema": {key: module.state_dict() for key, module in ema.items()},
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seconds": elapsed,
                }
                torch.save(state, checkpoint.with_suffix(".partial"))
                checkpoint.with_suffix(".partial").replace(checkpoint)
    return {key: module.eval() for key, module in ema.items()}


def _resume(
    checkpoint: Path, modules: dict[str, nn.Module], ema: dict[str, Any], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load a checkpoint and return the steps that were done and the seconds that they took."""
    state = torch.load(checkpoint, weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
        ema[key].load_state_dict(state["ema"][key])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]
