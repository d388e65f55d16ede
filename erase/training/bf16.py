"""Hold a UNet's weights in bf16 while it learns: half the memory, and half of the activations'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from erase_concept.pipelines.formats.weights import each_tensor
from erase_concept.training.shards import is_sharded


@contextmanager
def in_bf16(unet: nn.Module, base: Path, device: torch.device) -> Iterator[None]:
    """Hold a UNet's weights in bf16 on a device, and where they were in fp32 when the context ends.

    ``base`` holds them as they were, in any dtype. A weight that did not move gets the value that it had before. One
    that moved is what it was trained to.
    """
    place = next(unet.parameters()).device
    for p in unet.parameters():
        p.data = p.data.float().to(device, torch.bfloat16)  # never in the memory of a file
    try:
        yield
    finally:
        parameters = dict(unet.named_parameters())
        for name, before in each_tensor(base):
            if is_sharded(parameters[name]):  # a training that failed has left its shards
                continue
            p, after = parameters[name], parameters[name].detach().cpu()
            moved = after != before.to(torch.bfloat16)
            p.data = torch.where(moved, after.float(), before.float()).to(place)
