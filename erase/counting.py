"""What passes through a model take, counted on tensors without data: the bytes that live at once, and the operations.

The passes are carried out by the model's own modules, while each tensor that comes to be or goes is noted. No weights
are read; a full-size model takes some seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from erase_concept.pipelines.load import ModelConfigs
from erase_concept.pipelines.model import Diffusion
from erase_concept.training.adapters import Adapters

_TOKENS = 77
_ATEN = torch.ops.aten
# PyTorch's formulas, and those of attention for what attention is called on CPUs.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


def empty_model(make: ModelConfigs, *, bf16: bool = False) -> Diffusion:
    """Return a model without weights, text encoder and tokenizer, its UNet in fp32 or bf16."""
    components: dict[str, Any] = {"scheduler": DDIMScheduler.from_config(make.components["scheduler"])}
    components |= {part: empty_part(make, part).eval().requires_grad_(False) for part in ("unet", "vae")}
    if bf16:
        for module in components["unet"].modules():
            for name, p in module.named_parameters(recurse=False):  # in place it does not work without data
                setattr(module, name, nn.Parameter(p.to(torch.bfloat16), requires_grad=False))
    return Diffusion(make.family, components, source="")


def empty_part(make: ModelConfigs, part: str) -> nn.Module:
    """Return a part of a model, by diffusers' name, as its configuration describes it."""
    build = make.family.components[part].make
    assert build is not None  # the parts that are asked for have weights in every family
    return build(make.components[part])


class Passes(NamedTuple):
    """The passes of a step: rows without and with gradient, the images' size, and how they are computed."""

    frozen: int
    trained: int
    size: int | None
    recompute: bool = False
    precision: str = "no"


class Counted(NamedTuple):
    """The most bytes of activations, what waiting gradients add to them, and the operations."""

    activations: int
    gradients: int
    operations: int


def count_passes(
    model: Diffusion, passes: Passes, window: int = 0, *, adapted: Callable[[str], bool] | None = None
) -> Counted:
    """Carry the passes out, beside the weights. Gradients wait until so many bytes have come together."""
    side = (passes.size or model.size) // model.factor
    tokens = _TOKENS + model.family.extra_tokens
    trained = any(p.requires_grad for p in model.unet.parameters())

    def predicted(rows: int, *, embedded: bool = False) -> Tensor:
        latents = torch.randn(rows, model.unet.config.in_channels, side, side)
        width = model.unet.config.get("cross_attention_dim", 1)  # a label is one number
        embeddings = torch.randn(rows, tokens, width, requires_grad=embedded)
        return model.predict(latents, torch.zeros(rows, dtype=torch.int64), embeddings)

    if passes.recompute:
        model.unet.enable_gradient_checkpointing()
    changed = Adapters(model.unet, None, torch.Generator(), adapted) if adapted else None
    waiting: list[Tensor] = []

    def wait(parameter: Tensor) -> None:
        waiting.append(parameter)
        living.waiting += parameter.nbytes
        if living.waiting >= window:
            for each in waiting:
                each.grad = None
            waiting.clear()
            living.waiting = 0

    for p in (changed or model.unet).parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(wait)
    lower = torch.autocast(model.device.type, torch.bfloat16, enabled=passes.precision == "bf16")
    attached = changed.attached() if changed else nullcontext()
    with attached, LivingBytes(model.unet) as living:
        with lower:
            if passes.frozen:
                with torch.no_grad():
                    predicted(passes.frozen)
            if passes.trained:
                loss = predicted(passes.trained, embedded=not (trained or adapted)).square().mean()
        if passes.trained:
            loss.backward()
    return Counted(living.most, living.peak - living.most, living.operations)


def count_vae(model: Diffusion, size: int, *, encode: bool) -> Counted:
    """Encode or decode one image of ``size`` pixels a side."""
    side = size // model.factor
    with torch.no_grad(), LivingBytes(model.vae) as living:
        if encode:
            model.vae.encode(torch.randn(1, 3, size, size))
        else:
            model.vae.decode(torch.randn(1, model.vae.config.latent_channels, side, side))
    return Counted(living.peak, 0, living.operations)


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be and go, beside a module's parameters, and the operations.

    ``peak`` is the most bytes at once, and ``most`` the same without the gradients that are ``waiting``. PyTorch's own
    FlopCounterMode cannot stand in for the operations: it holds on to tensors where activations are recomputed.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.most = self.waiting = self.operations = 0
        self.sizes = dict.fromkeys((p.untyped_storage()._cdata for p in module.parameters()), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(function._overloadpacket):
            self.operations += int(formula(*args, **(kwargs or {}), out_val=out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak, self.most = max(self.peak, self.now), max(self.most, self.now - self.waiting)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
