"""Adapters of rank one: what a method may train in the place of a UNet's own weights, and then add to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.families.family import TRANSFORMER, Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS


def in_transformers(layers: Layers = UNET_LAYERS) -> Callable[[str], bool]:
    """Return what tells whether a weight is of a transformer: the layers that SPM's code adapts (arXiv 2312.16145)."""
    return lambda name: layers.group(name) in TRANSFORMER


class Adapters(nn.Module):
    """A UNet some of whose linear and convolutional layers have a change of rank one each, the only parameters.

    ``adapted`` tells of a weight's name whether its layer is one of them. One that a mask freezes as a whole has no
    change; in another the change is masked while it learns too, so that what is fused is what was trained. The UNet's
    own weights stay as they are until ``fuse``. Raises RequestError when the mask leaves no layer.
    """

    unet: Any

    def __init__(
        self,
        unet: Any,
        mask: Mask | None,
        generator: torch.Generator,
        adapted: Callable[[str], bool],
        *,
        down: Literal["uniform", "normal"] = "uniform",
    ) -> None:
        """Begin with changes of zero, for up is zero.

        Down is uniform within 1 / sqrt(its size), as torch draws a linear layer's weights, or standard normal, as
        diffusers' own LoRA layers of rank one begin.
        """
        super().__init__()
        self.layers: dict[str, nn.Linear | nn.Conv2d] = {}
        self.masks: dict[str, Tensor] = {}
        self.is_on = True
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        object.__setattr__(self, "unet", unet.requires_grad_(False))  # not a part: its weights are not the adapters'
        for name, layer in unet.named_modules():
            weight = f"{name}.weight"
            if not isinstance(layer, nn.Linear | nn.Conv2d) or not adapted(weight):
                continue
            if mask is not None and not mask.bits[weight].any():
                continue
            key = name.replace(".", "/")  # a parameter's name holds no dots
            size = layer.weight[0].numel()
            if down == "normal":
                drawn = torch.randn(size, generator=generator)
            else:
                drawn = (2 * torch.rand(size, generator=generator) - 1) / size**0.5
            self.down[key] = nn.Parameter(drawn.to(layer.weight.device))
            self.up[key] = nn.Parameter(torch.zeros(len(layer.weight), device=layer.weight.device))
            self.layers[key] = layer
            if mask is not None:
                self.masks[key] = mask.dense(weight).to(layer.weight.device)
        if not self.layers:
            raise RequestError("mask.kind", mask and mask.count, "lets no layer change that can have an adapter")

    @property
    def config(self) -> Any:
        """The UNet's configuration."""
        return self.unet.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with the UNet."""
        return self.unet(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        """Compute the UNet's activations anew in the backward pass, in which the adapters must still be attached."""
        self.unet.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.unet.disable_gradient_checkpointing()

    def change(self, key: str) -> Tensor:
        """Return the change of a layer's weight, masked."""
        change = torch.outer(self.up[key], self.down[key]).view(self.layers[key].weight.shape)
        return change * self.masks[key] if key in self.masks else change

    def _forward(self, key: str, rows: Tensor) -> Tensor:
        layer = self.layers[key]
        weight = layer.weight + self.change(key) if self.is_on else layer.weight
        if isinstance(layer, nn.Linear):
            return F.linear(rows, weight, layer.bias)
        return layer._conv_forward(rows, weight, layer.bias)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the UNet's layers work with their changes, until the context ends."""
        for key, layer in self.layers.items():
            layer.forward = partial(self._forward, key)  # type: ignore[method-assign]  # undone when the context ends
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.forward

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the changes out for a while: what the UNet predicts is then the base model's."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Return the layers' weights with their changes, by the names that they have in the UNet."""
        return {f"{key.replace('/', '.')}.weight": one.weight + self.change(key) for key, one in self.layers.items()}

    @torch.no_grad()
    def fuse(self, strength: float = 1.0) -> None:
        """Add the changes, so many times, to the UNet's weights.

        Those that a mask freezes keep every bit, a negative zero's too.
        """
        for key, layer in self.layers.items():
            changed = layer.weight + strength * self.change(key)
            layer.weight.copy_(torch.where(self.masks[key], changed, layer.weight) if key in self.masks else changed)
