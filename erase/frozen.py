"""Frozen means frozen: a base model's weights are kept, and compared bit by bit with what a run made of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from erase_concept.errors import EraseError
from erase_concept.files import atomic_write
from erase_concept.masks.mask import Mask
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.formats.weights import each_tensor

ROUNDED_TO = ("float16", "bfloat16", "float8_e4m3fn")  # in which models are shared


def keep_base(trained: nn.Module, file: Path, data: str = "") -> bool:
    """Keep the base model's weights until the end, for the comparison, and a hash of the data that a run begins with.

    A run that goes on finds both there: returns False, and leaves the file, when it began with others.
    """
    state = trained.state_dict()
    if file.exists():
        with suppress(SafetensorError), safe_open(file, "pt") as stored:  # a damaged file is written anew
            same_data = (stored.metadata() or {}).get("data", data) == data  # earlier versions did not say it
            return same_data and {*stored.keys()} == {*state} and all(map(_same_bits, each_tensor(file), repeat(state)))
    with atomic_write(file) as partial:
        save_tensors({name: value.contiguous() for name, value in state.items()}, partial, {"data": data})
    return True


def _same_bits(stored: tuple[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    name, before = stored
    now = state[name].detach().cpu()
    return (before.dtype, before.shape) == (now.dtype, now.shape) and torch.equal(_bits(before), _bits(now))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check_frozen(base: Path, erased: nn.Module, mask: Mask | None) -> dict[str, Any]:
    """Compare weights bit by bit with a file of the base model's, and count what changed, in all and outside the mask.

    ``surviving`` says how many changed weights still differ when both models are rounded to a dtype.

    Raises EraseError when a weight outside the mask changed, or none at all.
    """
    changed = outside = total = 0
    surviving = dict.fromkeys(ROUNDED_TO, 0)
    parameters = dict(erased.named_parameters())
    for name, stored in each_tensor(base):
        if name not in parameters:  # a buffer, such as BatchNorm's statistics
            continue
        before, after = stored.float(), parameters[name].detach().cpu()  # kept in the dtype of the base model's file
        differs = before.view(torch.int32) != after.view(torch.int32)
        changed += int(differs.sum())
        old, new = before[differs], after[differs]
        for name_of_dtype in surviving:
            kind = getattr(torch, name_of_dtype)
            surviving[name_of_dtype] += int((old.to(kind).float() != new.to(kind).float()).sum())
        total += differs.numel()
        if mask is not None:
            outside += int((differs & ~mask.dense(name)).sum())
    if outside:
        raise EraseError(f"{outside} weights outside the mask changed: this is a defect, nothing was exported")
    if not changed:
        raise EraseError("no weight changed: nothing was erased and nothing was exported")
    return {"weights": total, "changed": changed, "changed_outside_mask": outside, "surviving": surviving}
