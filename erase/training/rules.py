"""The rules by which weights are updated: Adam, AdamW and SGD, and the numbers of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

State = Literal["fp32", "bf16", "8bit"]
STATE_BYTES: dict[State, float] = {"fp32": 8, "bf16": 4, "8bit": 2 * (1 + 4 / 256)}  # of both of Adam's moments


class AdamNumbers(NamedTuple):
    """A step's numbers, all float32, for Adam's update of each salient weight w by its gradient g.

    g = grad_scale g + l2 w,  m = beta1 m + one_minus_beta1 g,  v = beta2 v + one_minus_beta2 g^2,
    w = decay_factor w - step_size m / (bias_correction sqrt(v) + eps)
    """

    beta1: np.float32
    one_minus_beta1: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32
    step_size: np.float32
    bias_correction: np.float32
    eps: np.float32
    grad_scale: np.float32
    l2: np.float32
    decay_factor: np.float32


@dataclass(frozen=True)
class Adam:
    """Settings of Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101), whose weight decay is decoupled."""

    lr: float
    name: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    state: State = "fp32"

    @property
    def moments(self) -> dict[str, bool]:
        """The moments of each weight: by name, whether it has a sign."""
        return {"mean": True, "square": False}

    def numbers(self, lr: float, count: int, scale: float) -> AdamNumbers:
        """Return the numbers of step ``count``, from 1, with gradients multiplied by ``scale``."""
        beta1, beta2 = self.betas
        decoupled = self.name == "adamw"
        step_size, bias_correction = lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        l2 = 0.0 if decoupled else self.weight_decay
        decay_factor = 1 - lr * self.weight_decay if decoupled else 1.0
        moments = (beta1, 1 - beta1, beta2, 1 - beta2)
        numbers = (*moments, step_size, bias_correction, self.eps, scale, l2, decay_factor)
        return AdamNumbers(*map(np.float32, numbers))


class SGDNumbers(NamedTuple):
    """A step's numbers, all float32, for SGD's update of each salient weight w by its gradient g.

    v = momentum v + grad_scale g + l2 w,  w = w - step_size v
    """

    momentum: np.float32
    step_size: np.float32
    grad_scale: np.float32
    l2: np.float32


@dataclass(frozen=True)
class SGD:
    """Settings of SGD with momentum and weight decay, as torch's without dampening. Its momentum is fp32."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    state: Literal["fp32"] = "fp32"

    @property
    def moments(self) -> dict[str, bool]:
        """The moment of each weight: by name, whether it has a sign."""
        return {"momentum": True}

    def numbers(self, lr: float, count: int, scale: float) -> SGDNumbers:
        """Return the numbers of a step, with gradients multiplied by ``scale``; they are the same in every step."""
        return SGDNumbers(*map(np.float32, (self.momentum, lr, scale, self.weight_decay)))
