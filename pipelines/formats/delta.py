"""Deltas: the change of a UNet as one small file, which can be applied and reverted, bit for bit.

Neighbouring floats have consecutive bit patterns. So the change of a weight is stored as a number of steps from float
to float: a whole number, which is exact in both directions, while a difference of floats is not. For each parameter
that changed, the file holds one bit for each weight (did it change?) and the number of steps of those that did. The
numbers take the fewest bytes that hold most of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.tensors import open_tensors, read_shapes, save_tensors
from erase_concept.pipelines.model import weights_hash

FORMAT = "erase-concept delta 1"
_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _INTEGERS}


@dataclass(frozen=True)
class Delta:
    """An opened delta file: the dtype of its weights, the hashes of both UNets, and the other metadata."""

    file: Path
    dtype: torch.dtype
    base: str
    erased: str
    shapes: dict[str, tuple[int, ...]]
    about: dict[str, str]


def save_delta(base: nn.Module, erased: nn.Module, file: str | Path, about: dict[str, str]) -> None:
    """Write the change from ``base`` to ``erased``, two UNets of the same shapes, and check the file.

    It is one between weights in the dtype of ``erased``, to which the base's are converted, a tensor at a time. Raises
    ValueError when their shapes differ or when ``erased`` is not in fp32, fp16 or bf16 throughout, and EraseError,
    leaving no file, when what is read back does not lead to ``erased``, bit for bit.
    """
    tensors: dict[str, Tensor] = {}
    before, after = base.state_dict(), erased.state_dict()
    shapes = {name: tuple(value.shape) for name, value in before.items()}
    if shapes != {name: tuple(value.shape) for name, value in after.items()}:
        raise ValueError("a delta is between two models of the same shapes")
    dtype = next(iter(after.values())).dtype
    if {value.dtype for value in after.values()} != {dtype} or dtype not in _INTEGERS:
        raise ValueError(f"a delta is between two models of one dtype: {', '.join(_DTYPES)}")
    for name, value in before.items():
        steps = _ordered(after[name]) - _ordered(value.to(dtype))
        changed = steps != 0
        if changed.any():
            narrow, wide = _narrowed(steps[changed])
            parts = {"changed": np.packbits(changed), "steps": narrow, "wide": wide}
            tensors |= {f"{name}:{part}": torch.from_numpy(array) for part, array in parts.items()}
    own = {"format": FORMAT, "dtype": str(dtype).removeprefix("torch."), "shapes": json.dumps(shapes)}
    hashes = {"base_unet_sha256": weights_hash(base, dtype), "erased_unet_sha256": weights_hash(erased)}
    with atomic_write(Path(file)) as partial:
        save_tensors(tensors, partial, {**about, **own, **hashes})
        with safe_open(partial, "pt") as stored:
            moved = _changed(stored)
            for name, value in before.items():
                try:
                    led = _moved(stored, name, value.to(dtype)) if name in moved else _ordered(value.to(dtype))
                except (SafetensorError, ValueError):
                    led = None
                if led is None or not np.array_equal(led, _ordered(after[name])):
                    raise EraseError(f"{file}: {name} was not written as it is; what was written is removed")


def open_delta(file: str | Path, *, setting: str = "delta") -> Delta:
    """Read a delta file's metadata; raises RequestError when it is missing, damaged or no delta."""
    file = Path(file)
    try:
        with open_tensors(file) as tensors:
            about: dict[str, str] = dict(tensors.metadata() or {})
        if about.pop("format", "") != FORMAT:
            raise RequestError(setting, file, "is no delta file of erase-concept")
        shapes = read_shapes(about.pop("shapes"))
        dtype = _DTYPES[about.pop("dtype")]
        base, erased = about.pop("base_unet_sha256"), about.pop("erased_unet_sha256")
        return Delta(file, dtype, base, erased, shapes, about)
    except RequestError:
        raise
    except (ValueError, LookupError) as problem:
        raise RequestError(setting, file, f"is not a readable delta: {problem}") from None


def apply_delta(delta: Delta, unet: nn.Module, *, revert: bool = False, transfer: bool = False) -> None:
    """Turn the base UNet into the erased one in place, or with ``revert`` the erased one into the base.

    The UNet must be in the delta's dtype. Its hash is checked before, and the result's hash after, so the result is the
    model that the delta was made from, bit for bit. With ``transfer`` neither is checked: each weight of another UNet
    of the same shapes moves by the same number of floats, so a weight of twice the size moves twice as far. Measure
    whether the concept is gone then. Raises RequestError when it is the wrong UNet, EraseError when the result is not
    the right one.
    """
    state = unet.state_dict()
    for name in (*delta.shapes, *state):
        have, want = tuple(state[name].shape) if name in state else None, delta.shapes.get(name)
        if have != want:
            raise RequestError("model", name, f"does not fit: the delta has {_side(want)}, the model has {_side(have)}")
        if (own := state[name].dtype) != delta.dtype:
            raise RequestError("model", name, f"is in {own}, and the delta is for {delta.dtype}: load it in that dtype")
    wanted, promised = (delta.erased, delta.base) if revert else (delta.base, delta.erased)
    if not transfer and weights_hash(unet) != wanted:
        which = "erased model that this delta leads to" if revert else "base model that this delta was made for"
        raise RequestError("model", f"(UNet {weights_hash(unet)[:16]})", f"is not the {which} ({wanted[:16]})")
    try:
        with open_tensors(delta.file) as tensors, torch.no_grad():
            for name in sorted(_changed(tensors)):
                flat = _moved(tensors, name, state[name], revert=revert)
                state[name].copy_(_floats(flat, delta.dtype).view(state[name].shape))
    except (ValueError, LookupError, TypeError, SafetensorError) as problem:
        raise RequestError("delta", delta.file, f"is damaged: {problem}") from None
    if transfer:
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise EraseError(f"{delta.file} leads this model to weights that are no numbers: it does not transfer")
    elif weights_hash(unet) != promised:
        raise EraseError(f"{delta.file} led to another model than it promised: it is damaged")


def moved_weights(delta: Delta, base: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights to which a delta leads, one at a time, from the base UNet's; their hash is not checked.

    Raises RequestError when a weight does not fit, or the delta has one that the base has not.
    """
    left = dict(delta.shapes)
    try:
        with safe_open(delta.file, "pt") as tensors:
            moved = _changed(tensors)
            for name, value in base:
                if tuple(value.shape) != left.pop(name, None):
                    raise RequestError("delta", delta.file, f"does not fit the base model: {name}")
                before = value.to(delta.dtype)
                after = _floats(_moved(tensors, name, before), delta.dtype) if name in moved else before
                yield name, after.view(value.shape)
    except (OSError, SafetensorError, KeyError, IndexError, ValueError) as problem:
        if isinstance(problem, RequestError):
            raise
        raise RequestError("delta", delta.file, f"is damaged: {problem}") from None
    if left:
        raise RequestError("delta", delta.file, f"does not fit the base model: {next(iter(left))}")


def _changed(tensors: Any) -> set[str]:
    """Return the names of the parameters that an opened delta file moves."""
    return {key.rpartition(":")[0] for key in tensors.keys()}


def _moved(tensors: Any, name: str, value: Tensor, *, revert: bool = False) -> np.ndarray:
    """Return a parameter after its steps, or before them, as flat integers in the order of the floats."""
    parts = [tensors.get_tensor(f"{name}:{part}") for part in ("changed", "steps", "wide")]
    kinds = (torch.uint8, *[torch.int8, torch.int16, torch.int32])
    if not all(part.ndim == 1 and part.dtype in kinds for part in parts):
        raise ValueError(f"{name} has steps that are no list of whole numbers")
    packed, narrow, wide = (part.numpy() for part in parts)
    flat = _ordered(value)
    steps = _widened(narrow, wide, flat.dtype)
    flat[np.unpackbits(packed, count=flat.size).astype(bool)] += -steps if revert else steps
    return flat


def _ordered(value: Tensor) -> np.ndarray:
    """Return floats as integers in the same order, flat: neighbours differ by one, and -0.0 comes before 0.0."""
    bits = value.detach().cpu().contiguous().view(-1).view(_INTEGERS[value.dtype]).numpy()
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def _floats(ordered: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.where(ordered < 0, ordered ^ np.iinfo(ordered.dtype).max, ordered)).view(dtype)


def _narrowed(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps in the integer type that takes the fewest bytes, and those too wide for it, in order.

    The type's lowest number stands in the place of a wide one.
    """
    best: tuple[int, np.ndarray, np.ndarray] | None = None
    for kind in (np.int8, np.int16, np.int32):
        if np.dtype(kind).itemsize > steps.itemsize:
            break
        lowest, highest = np.iinfo(kind).min, np.iinfo(kind).max
        fits = (steps > lowest) & (steps <= highest)
        size = steps.size * np.dtype(kind).itemsize + int((~fits).sum()) * steps.itemsize
        if best is None or size < best[0]:
            best = size, np.where(fits, steps, lowest).astype(kind), steps[~fits]
    assert best is not None  # int8 is never wider than a float
    return best[1], best[2]


def _widened(narrow: np.ndarray, wide: np.ndarray, kind: np.dtype) -> np.ndarray:
    steps = narrow.astype(kind)
    steps[narrow == np.iinfo(narrow.dtype).min] = wide
    return steps


def _side(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
