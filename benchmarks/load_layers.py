"""All that walks over a UNet's layers, on UNets of many layers without weights, for ``load.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from erase_concept.masks import SCOPES, in_scope
from erase_concept.masks.choose import choose
from erase_concept.masks.mask import Mask, describe, expand_to
from erase_concept.methods.salun import SalUnSettings
from erase_concept.pipelines.formats.lora import layers_found, lora_names
from erase_concept.pipelines.load import configs
from erase_concept.predict import predict_saliency, predict_step
from erase_concept.recipe import MaskRecipe
from erase_concept.training.adapters import Adapters, in_transformers

FEWEST, EACH = 64, 69  # layers of this UNet with no layer in a block, and of each that is added to every block
NARROW = {"block_out_channels": [16, 32, 48], "norm_num_groups": 8}


def layers(size: int, folder: Path) -> Iterator[str]:
    """Do with a UNet of so many linear and convolutional layers what needs no weights."""
    folder.mkdir()
    make = configs("emojinette")
    per_block = max(1, round((size - FEWEST) / EACH))
    config = make.components["unet"] | NARROW | {"layers_per_block": per_block}
    make = replace(make, components={**make.components, "unet": config})
    build = make.family.components["unet"].make
    assert build is not None
    yield "start"
    with torch.device("meta"):
        unet = build(config)
    yield "UNet made"
    assert size < FEWEST + EACH or size == sum(isinstance(one, nn.Linear | nn.Conv2d) for one in unet.modules())
    yield ""
    shapes = {scope: in_scope(unet, scope) for scope in SCOPES}
    yield "scopes"
    mask = expand_to(choose("random", 0.5, shapes["attention"], lambda: (), 0), unet)
    mask.check(unet)
    yield "mask chosen"
    mask.save(folder / "mask.safetensors")
    again = Mask.load(folder / "mask.safetensors")
    assert (again - mask).count == 0
    yield "mask saved and read"
    describe(again)
    again.overlap(mask)
    again.sha256()
    yield "mask described"
    for style in ("kohya", "diffusers"):
        layers_found(lora_names(unet, make.family, style), style)
    make.family.single_file.layouts["unet"].names(unet.state_dict())
    yield "keys of exports"
    Adapters(unet, mask, torch.Generator().manual_seed(0), in_transformers())
    yield "adapters"
    predict_saliency(make, MaskRecipe())
    yield "saliency predicted"
    predict_step(make, SalUnSettings(), 0.5)
    yield "step predicted"
