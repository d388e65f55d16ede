"""Scopes: the parts of a model that an erasure can be confined to."""

from __future__ import annotations

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
SCOPES = ("full", "cross-attention", "self-attention", "non-cross-attention", "noxattn")
TEXT_ENCODER = "text-encoder"  # the one scope outside the UNet: the token embeddings of the concept's own words


def in_scope(model: nn.Module, scope: str, layers: Layers = UNET_LAYERS) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of one of ``SCOPES``, by name; raises RequestError for another scope."""
    if scope not in SCOPES:
        raise RequestError("mask.scope", scope, f"allowed: {', '.join(SCOPES)}")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if scope == "full":
        return shapes
    if scope == "noxattn":
        left_out = {name for name in shapes if layers.is_time_or_output(name)}
        shapes = {name: shape for name, shape in shapes.items() if name not in left_out}
        scope = "non-cross-attention"
    group = scope.removeprefix("non-")
    return {name: shape for name, shape in shapes.items() if (layers.group(name) == group) == (scope == group)}


def token_rows(encoder: CLIPTextModel, tokens: Tensor) -> Mask:
    """Return the mask of a text encoder that allows the embeddings of these tokens, int64 [n], and nothing else."""
    table: Any = encoder.get_input_embeddings().weight
    name = next(name for name, p in encoder.named_parameters() if p is table)
    rows = torch.zeros(table.shape, dtype=torch.bool)
    rows[tokens] = True
    return expand_to(Mask({name: torch.from_numpy(np.packbits(rows.numpy()))}, {name: tuple(table.shape)}), encoder)
