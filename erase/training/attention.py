"""What a UNet's cross-attentions attend to: their maps, with gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from erase_concept.pipelines.families.family import Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS


@contextmanager
def cross_attentions(unet: nn.Module, layers: Layers = UNET_LAYERS) -> Iterator[list[tuple[Any, Tensor, Tensor]]]:
    """Collect each cross-attention that is called, with what it attends from [n, pixels, width] and to, with gradient.

    What they compute is not touched, so activations may be computed anew after the context has ended.
    """
    seen: list[tuple[Any, Tensor, Tensor]] = []

    def note(layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any], _: Tensor) -> None:
        seen.append((layer, given[0], named["encoder_hidden_states"]))

    found = [layer for name, layer in unet.named_modules() if layers.is_cross_attention(name)]
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in found]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention_maps(layer: Any, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Return a cross-attention's probabilities [n, heads, pixels, tokens], which its own fused arithmetic never has."""
    queries, keys = layer.head_to_batch_dim(layer.to_q(pixels)), layer.head_to_batch_dim(layer.to_k(tokens))
    maps: Tensor = layer.get_attention_scores(queries, keys)
    return maps.unflatten(0, (len(pixels), -1))
