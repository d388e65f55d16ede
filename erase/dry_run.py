"""What a run will take before it is begun: memory and time, from a model's configuration alone.

Each stage's passes through the UNet are carried out on tensors without data, and what lives at once is counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from erase_concept.counting import Passes, count_passes, empty_model, empty_part
from erase_concept.masks import TEXT_ENCODER, in_scope
from erase_concept.method import Phase
from erase_concept.methods import METHODS
from erase_concept.pipelines.load import ModelConfigs, configs
from erase_concept.pipelines.processes import processes
from erase_concept.recipe import MaskRecipe, Recipe, in_low_precision
from erase_concept.training.loop import Training
from erase_concept.training.optimizer import STATE_BYTES, TOGETHER

GIB = 2**30
_CONTEXT = 600 << 20  # what CUDA takes for itself


@dataclass(frozen=True)
class Prediction:
    """What a stage takes: bytes by what they are for, and floating point operations of each of its steps."""

    bytes: dict[str, int]
    operations: int

    @property
    def peak(self) -> int:
        """All bytes together."""
        return sum(self.bytes.values())


def predict_step(
    make: ModelConfigs,
    settings: Training,
    density: float,
    *,
    phases: Sequence[Phase] = (),
    scope: str = "full",
    size: int | None = None,
) -> Prediction:
    """Predict what a training step takes, at the moment when that is most.

    ``make`` holds the model's configurations, ``density`` is the mask's share of the scope's weights that
    may change, and ``size`` the side of the images, by default the model's. ``phases`` are those of the method's
    record, by default SalUn's: one pass on the forget rows for the target, and one on forget and retain rows. What the
    process takes before it loads a model is not in it.
    """
    phases = phases or (Phase(frozen=settings.batch_size, trained=2 * settings.batch_size),)
    found = [_predict_phase(make, settings, density, phase, scope, size) for phase in phases]
    most = max(found, key=lambda one: one.peak)
    return Prediction(most.bytes, max(one.operations for one in found) * settings.accumulation)


def _predict_phase(
    make: ModelConfigs, settings: Training, density: float, phase: Phase, scope: str, size: int | None
) -> Prediction:
    at_once = settings.accumulation == 1 and settings.max_grad_norm is None
    with FakeTensorMode():
        model = empty_model(make, bf16=settings.weights == "bf16")
        sizes = {name: p.nbytes for name, p in model.unet.named_parameters()}
        counts = {name: p.numel() for name, p in model.unet.named_parameters()}
        moving = {} if scope == TEXT_ENCODER else {name: sizes[name] for name in in_scope(model.unet, scope)}
        encoder, table = _text_encoder(make) if scope == TEXT_ENCODER else (0, 0)
        for name, p in model.unet.named_parameters():
            p.requires_grad_(name in moving and phase.adapted is None)
        passes = Passes(phase.frozen, phase.trained, size, settings.recompute, settings.precision)
        window = 0 if phase.gradients else TOGETHER
        measured = count_passes(model, passes, window, adapted=phase.adapted)
    weights, largest = sum(sizes.values()), max(sizes.values())
    free = 0 if phase.adapted else sum(moving.values())  # adapters are few beside the weights
    optimized = 0 if phase.adapted else sum(counts[name] for name in moving)
    kept = measured.gradients if at_once and not phase.gradients else free
    return Prediction(
        {
            "weights": weights + encoder,
            "optimizer": round(optimized * density * STATE_BYTES[settings.state]) if phase.optimizer else 0,
            "mask": sum(counts.values()) // 8,
            "activations": measured.activations,
            "gradients": round(max(1.0, phase.gradients) * kept) + table,
            "copies": round(phase.copies * weights),
            # Layers work on copies of their weights in an order of their own; three of the largest are allowed for.
            "workspace": 3 * largest,
        },
        measured.operations,
    )


def predict_edit(make: ModelConfigs) -> Prediction:
    """Predict what a closed form takes, whose matrices are small beside the weights."""
    with FakeTensorMode():
        sizes = [p.nbytes for p in empty_model(make).unet.parameters()]
    return Prediction({"weights": sum(sizes), "workspace": 3 * max(sizes)}, 0)


def predict_saliency(
    make: ModelConfigs, settings: MaskRecipe, *, size: int | None = None, bf16: bool = False
) -> Prediction:
    """Predict a batch of the saliency's sums of gradients, which are made before the training's state is."""
    with FakeTensorMode():
        model = empty_model(make, bf16=bf16)
        sizes = [p.nbytes for p in model.unet.requires_grad_(True).parameters()]
        rows = settings.batch_size * (2 if settings.guidance else 1)
        measured = count_passes(model, Passes(0, rows, size, settings.recompute))
    elsewhere = settings.offload and torch.cuda.is_available()
    sums = 0 if elsewhere else 4 * sum(p.numel() for p in model.unet.parameters())  # in fp32
    found = {"weights": sum(sizes), "sums": sums, "activations": measured.activations}
    return Prediction(found | {"gradients": max(sizes), "workspace": 3 * max(sizes)}, measured.operations)


def expect(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe's mask and each step of its method are expected to take: GiB at most, and seconds.

    Memory is that of the process on a CPU, and of the device on another. Seconds are the operations over what the
    device is measured to do: good for a plan, not for a bar.
    """
    make, settings, device = configs(recipe.model, ema=recipe.ema), recipe.settings, processes().device
    density = 1.0 if recipe.mask.kind == "none" else 1 - recipe.mask.sparsity
    if recipe.mask.combine == "union":
        density = min(1.0, density * len(recipe.concept.parts))  # at most: their masks overlap
    size = recipe.data.size
    stages = {}
    if isinstance(settings, Training):
        phases = METHODS.find(recipe.method).memory(settings)
        stages["step"] = predict_step(make, settings, density, phases=phases, scope=recipe.mask.scope, size=size)
    else:
        stages["edit"] = predict_edit(make)
    if recipe.mask.kind in ("salient", "least-salient"):
        stages["mask, each batch"] = predict_saliency(make, recipe.mask, size=size, bf16=in_low_precision(recipe))
    process = psutil.Process().memory_info().rss if device.type == "cpu" else _CONTEXT
    speed = operations_per_second(device)
    return {
        name: {
            "peak_gib": round((stage.peak + process) / GIB, 2),
            "seconds": round(stage.operations / speed, 1),
            "of_which_gib": {part: round(size / GIB, 2) for part, size in (stage.bytes | {"process": process}).items()},
        }
        for name, stage in stages.items()
    }


def operations_per_second(device: torch.device) -> float:
    """Measure how fast a device is at what UNets are made of, a convolution forward and backward in fp32."""
    layer = nn.Conv2d(640, 640, 3, padding=1, device=device)
    rows = torch.randn(2, 640, 32, 32, device=device, requires_grad=True)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            layer(rows).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return counter.get_total_flops() / best


def _text_encoder(make: ModelConfigs) -> tuple[int, int]:
    """Return the bytes of a text encoder's weights and of the gradient of its token embeddings, which are trained."""
    encoder: Any = empty_part(make, "text_encoder")
    table = encoder.get_input_embeddings().weight
    return sum(p.nbytes for p in encoder.parameters()), table.nbytes
