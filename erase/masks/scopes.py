"""Scopes: the parts of a model that an erasure can be confined to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask, expand_to
from erase_concept.pipelines.families.family import Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS

if TYPE_CHECKING:
    from transformers import CLIPTextModel

# Of the UNet. "noxattn" is what the authors' code of ESD, EraseDiff and Selective Amnesia calls so: all but
# cross-attention, the time embedding and the last layers.
SCOPES = (
    "full",
    "cross-attention",
    "keys-and-values",
    "self-attention",
    "attention",
    "non-cross-attention",
    "noxattn",
)
WITHOUT_KEYS_AND_VALUES = ("self-attention", "non-cross-attention", "noxattn")  # without those of cross-attention
TEXT_ENCODER = "text-encoder"  # the one scope outside the UNet: the token embeddings of the concept's own words


def in_scope(model: nn.Module, scope: str, layers: Layers = UNET_LAYERS) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of one of ``SCOPES``, by name; raises RequestError for another scope."""
    if scope not in SCOPES:
        raise RequestError("mask.scope", scope, f"allowed: {', '.join(SCOPES)}")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    inside: dict[str, Callable[[str], bool]] = {
        "full": lambda name: True,
        "cross-attention": lambda name: layers.group(name) == "cross-attention",
        "keys-and-values": layers.is_key_or_value,
        "self-attention": lambda name: layers.group(name) == "self-attention",
        "attention": lambda name: layers.group(name) in ("cross-attention", "self-attention"),
        "non-cross-attention": lambda name: layers.group(name) != "cross-attention",
        "noxattn": lambda name: layers.group(name) != "cross-attention" and not layers.is_time_or_output(name),
    }
    return {name: shape for name, shape in shapes.items() if inside[scope](name)}


def token_rows(encoder: CLIPTextModel, tokens: Tensor) -> Mask:
    """Return the mask of a text encoder that allows the embeddings of these tokens, int64 [n], and nothing else."""
    table: Any = encoder.get_input_embeddings().weight
    name = next(name for name, p in encoder.named_parameters() if p is table)
    rows = torch.zeros(table.shape, dtype=torch.bool)
    rows[tokens] = True
    return expand_to(Mask({name: torch.from_numpy(np.packbits(rows.numpy()))}, {name: tuple(table.shape)}), encoder)
