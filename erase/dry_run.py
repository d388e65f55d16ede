"""What a run will take before it is begun: memory and time, from a model's configuration alone.

A step is carried out on tensors without data, by the very UNet, while the bytes that live at once and the operations
are counted. No weights are read; a full-size model takes some seconds.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from erase_concept.masks import TEXT_ENCODER
from erase_concept.pipelines.formats.read_single_file import MODEL_CLASSES
from erase_concept.pipelines.load import configs
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.processes import processes
from erase_concept.recipe import MaskRecipe, Recipe
from erase_concept.training.loop import Training
from erase_concept.training.optimizer import STATE_BYTES, TOGETHER

GIB = 2**30
_TOKENS = 77
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


def predict_step(make: dict[str, Any], settings: Training, density: float, *, size: int | None = None) -> Prediction:
    """Predict a training step of ``batch_size`` forget and as many retain rows, the target from the present model.

    ``make`` holds the configurations of the model's parts, ``density`` is the mask's share of weights that may change,
    and ``size`` the side of the images, by default the model's. What the process takes before it loads a model is not
    in it. Layers work on copies of their weights in an order of their own; three of the largest are allowed for.
    """
    with FakeTensorMode():
        model = _model(make)
        largest = max(p.nbytes for p in model.unet.parameters())
        weights = sum(p.nbytes for p in model.unet.parameters())
        peak, operations = _measure(
            model, settings.batch_size, 2 * settings.batch_size, size, settings.recompute, settings.precision
        )
    salient = round(weights / 4 * density)
    at_once = settings.accumulation == 1 and settings.max_grad_norm is None
    return Prediction(
        {
            "weights": weights,
            "optimizer": round(salient * STATE_BYTES[settings.state]),
            "mask": weights // 32,
            "activations": peak,
            "gradients": min(TOGETHER + largest, weights) if at_once else weights,
            "workspace": 3 * largest,
        },
        operations * settings.accumulation,
    )


def predict_saliency(make: dict[str, Any], settings: MaskRecipe, *, size: int | None = None) -> Prediction:
    """Predict a batch of the saliency's sums of gradients, which are made before the training's state is."""
    with FakeTensorMode():
        model = _model(make)
        largest = max(p.nbytes for p in model.unet.parameters())
        weights = sum(p.nbytes for p in model.unet.parameters())
        rows = settings.batch_size * (2 if settings.guidance else 1)
        peak, operations = _measure(model, 0, rows, size, settings.recompute, "no")
    elsewhere = settings.offload and torch.cuda.is_available()
    sums = 0 if elsewhere else weights
    return Prediction(
        {"weights": weights, "sums": sums, "activations": peak, "gradients": largest, "workspace": 3 * largest},
        operations,
    )


def expect(recipe: Recipe) -> dict[str, Any]:
    """Return what the recipe's mask and each step of its training are expected to take: GiB at most, and seconds.

    Memory is that of the process on a CPU, and of the device on another. Seconds are the operations over what the
    device is measured to do: good for a plan, not for a bar.
    """
    make, settings, device = configs(recipe.model), recipe.settings, processes().device
    density = 1.0 if recipe.mask.kind == "none" else 1 - recipe.mask.sparsity
    if recipe.mask.scope == TEXT_ENCODER:
        density = 0.0  # of the UNet
    if recipe.mask.combine == "union":
        density = min(1.0, density * len(recipe.concept.parts))  # at most: their masks overlap
    size = recipe.data.size
    stages = {}
    if isinstance(settings, Training):  # a closed form takes no steps
        stages["step"] = predict_step(make, settings, density, size=size)
    if recipe.mask.kind in ("salient", "least-salient"):
        stages["mask, each batch"] = predict_saliency(make, recipe.mask, size=size)
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


def _model(make: dict[str, Any]) -> Diffusion:
    """Return a model without weights, text encoder and tokenizer."""
    unet, vae = (MODEL_CLASSES[part](make[part]).eval().requires_grad_(False) for part in ("unet", "vae"))
    missing: Any = None
    return Diffusion(missing, missing, vae, unet, DDIMScheduler.from_config(make["scheduler"]), source="")


def _measure(
    model: Diffusion, frozen: int, trained: int, size: int | None, recompute: bool, precision: str
) -> tuple[int, int]:
    """Return the most bytes that live beside the weights in a step on so many rows, and its operations."""
    side = (size or model.size) // model.factor
    xl = model.unet.config.addition_embed_type == "text_time"

    def predicted(rows: int) -> Tensor:
        latents = torch.randn(rows, model.unet.config.in_channels, side, side)
        embeddings = torch.randn(rows, _TOKENS + xl, model.unet.config.cross_attention_dim)
        return model.predict(latents, torch.zeros(rows, dtype=torch.int64), embeddings)

    if recompute:
        model.unet.enable_gradient_checkpointing()
    model.unet.requires_grad_(True)

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for p in model.unet.parameters():
        p.register_post_accumulate_grad_hook(drop)
    lower = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")
    with FlopCounterMode(display=False) as counter, _Living(model.unet) as living:
        with lower:
            if frozen:
                with torch.no_grad():
                    predicted(frozen)
            loss = predicted(trained).square().mean()
        loss.backward()
    return living.peak, counter.get_total_flops()


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be and go, beside a module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = dict.fromkeys((p.untyped_storage()._cdata for p in module.parameters()), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
