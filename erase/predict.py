"""What the passes of each stage of a run take, from a model's configuration alone: bytes and operations.

No weights are read; a full-size model takes some seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from erase_concept.counting import Passes, count_passes, count_vae, empty_model, empty_part
from erase_concept.masks import TEXT_ENCODER, in_scope
from erase_concept.method import Phase
from erase_concept.pipelines.load import ModelConfigs
from erase_concept.recipe import MaskRecipe
from erase_concept.training.loop import Training
from erase_concept.training.optimizer import TOGETHER
from erase_concept.training.rules import STATE_BYTES

# What malloc keeps on CPUs, in holes between what lives, as a share of the activations where these are computed anew.
# Measured on steps of SD 1.x's UNet at three sizes.
HELD_BY_MALLOC = 1.0


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
        sampled = count_passes(model, Passes(1, 0, size)).operations * phase.sampled if phase.sampled else 0
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
        measured.operations + sampled,
    )


def predict_edit(make: ModelConfigs) -> Prediction:
    """Predict what a closed form takes, whose matrices are small beside the weights."""
    with FakeTensorMode():
        sizes = [p.nbytes for p in empty_model(make).unet.parameters()]
    return Prediction({"weights": sum(sizes), "workspace": 3 * max(sizes)}, 0)


def predict_saliency(
    make: ModelConfigs, settings: MaskRecipe, *, size: int | None = None, bf16: bool = False, on_device: bool = True
) -> Prediction:
    """Predict a batch of the saliency's sums of gradients, which are made before the training's state is.

    ``on_device`` tells whether the sums are where the UNet is.
    """
    with FakeTensorMode():
        model = empty_model(make, bf16=bf16)
        sizes = [p.nbytes for p in model.unet.requires_grad_(True).parameters()]
        rows = settings.batch_size * (2 if settings.guidance else 1)
        measured = count_passes(model, Passes(0, rows, size, settings.recompute))
        sums = 4 * _count(model.unet) * on_device  # in fp32
    found = {"weights": sum(sizes), "sums": sums, "activations": measured.activations}
    return Prediction(found | {"gradients": max(sizes), "workspace": 3 * max(sizes)}, measured.operations)


def predict_sampling(make: ModelConfigs, *, size: int | None = None, bf16: bool = False) -> Prediction:
    """Predict a step of sampling one image with guidance: two rows through the UNet, beside text encoders and VAE."""
    with FakeTensorMode():
        model = empty_model(make, bf16=bf16)
        weights = [p.nbytes for p in model.unet.parameters()]
        others = sum(_bytes(empty_part(make, part)) for part, one in make.family.components.items() if one.make)
        counted = count_passes(model, Passes(2, 0, size))
    found = {"weights": sum(weights), "activations": counted.activations, "workspace": 3 * max(weights)}
    return Prediction(found | {"text encoders and VAE": others - 4 * _count(model.unet)}, counted.operations)


def predict_vae(make: ModelConfigs, *, encode: bool, size: int | None = None) -> Prediction:
    """Predict what encoding or decoding one image takes in activations."""
    with FakeTensorMode():
        model = empty_model(make)
        counted = count_vae(model, size or model.size, encode=encode)
    return Prediction({"activations": counted.activations}, counted.operations)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _text_encoder(make: ModelConfigs) -> tuple[int, int]:
    """Return the bytes of a text encoder's weights and of the gradient of its token embeddings, which are trained."""
    encoder: Any = empty_part(make, "text_encoder")
    table = encoder.get_input_embeddings().weight
    return sum(p.nbytes for p in encoder.parameters()), table.nbytes
