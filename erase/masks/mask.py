"""The mask: which weights an erasure may change, one bit for each weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS
from erase_concept.pipelines.formats.tensors import open_tensors, read_shapes, save_tensors

_COUNTED = 1 << 24  # bytes whose bits are counted at a time


@dataclass(frozen=True, eq=False)
class Mask:
    """One bit for each weight of the named parameters; a parameter that is not named is frozen as a whole.

    ``bits[name]`` is uint8 [ceil(weights / 8)], the first weight in the highest bit. ``provenance`` says in strings
    where the mask comes from.
    """

    bits: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of weights that it is for."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def count(self) -> int:
        """Number of weights that may change."""
        return sum(self._ones(name) for name in self.bits)

    @property
    def density(self) -> float:
        """Share of the weights that may change."""
        return self.count / self.total if self.total else 0.0

    def _ones(self, name: str) -> int:
        parts = (part.numpy() for part in self.bits[name].split(_COUNTED))
        return sum(int(np.unpackbits(part).sum(dtype=np.int64)) for part in parts)

    def dense(self, name: str) -> Tensor:
        """Return one parameter's mask as a boolean tensor of the parameter's shape."""
        shape = self.shapes[name]
        flat = np.unpackbits(self.bits[name].numpy(), count=int(np.prod(shape)))
        return torch.from_numpy(flat.astype(bool)).view(shape)

    def layers(self) -> dict[str, tuple[int, int]]:
        """Return for each parameter how many of its weights may change, and how many it has."""
        return {name: (self._ones(name), int(np.prod(shape))) for name, shape in self.shapes.items()}

    def sha256(self) -> str:
        """Return the SHA-256 over names, shapes and bits."""
        digest = hashlib.sha256()
        for name in sorted(self.bits):
            digest.update(f"{name} {self.shapes[name]}\n".encode())
            digest.update(self.bits[name].numpy().tobytes())
        return digest.hexdigest()

    def check(self, model: nn.Module, *, setting: str = "mask.kind") -> None:
        """Raise RequestError when the mask was made for another model, naming the first parameter that differs."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        _check_shapes(self.shapes, shapes, setting, "the mask", "the model")

    def __or__(self, other: Mask) -> Mask:
        """Union: the weights of either mask."""
        return self._combined(other, torch.bitwise_or, "|")

    def __and__(self, other: Mask) -> Mask:
        """Intersection: the weights of both masks."""
        return self._combined(other, torch.bitwise_and, "&")

    def __sub__(self, other: Mask) -> Mask:
        """Difference: the weights of this mask that are not in the other."""
        return self._combined(other, lambda a, b: a & ~b, "-")

    def _combined(self, other: Mask, operation: Callable[[Tensor, Tensor], Tensor], sign: str) -> Mask:
        _check_shapes(self.shapes, other.shapes, "mask", "the first mask", "the second")
        bits = {name: operation(self.bits[name], other.bits[name]) for name in self.bits}
        made = " ".join((self.provenance.get("concept", "?"), sign, other.provenance.get("concept", "?")))
        return Mask(bits, self.shapes, {"concept": made})

    def overlap(self, other: Mask) -> float:
        """Return the Jaccard index: weights of both masks over weights of either; 1 for two empty masks."""
        either = (self | other).count
        return (self & other).count / either if either else 1.0

    def save(self, file: Path) -> None:
        """Write the mask as safetensors, shapes and provenance in the metadata."""
        metadata = {"format": "erase-concept mask 1", "shapes": json.dumps(self.shapes), **self.provenance}
        with atomic_write(file) as partial:
            save_tensors(self.bits, partial, metadata)

    @classmethod
    def load(cls, file: Path, *, setting: str = "mask.kind") -> Mask:
        """Read a mask; raises RequestError when the file is missing, damaged or no mask."""
        try:
            with open_tensors(Path(file)) as tensors:
                metadata: dict[str, str] = dict(tensors.metadata() or {})
                if metadata.pop("format", "") != "erase-concept mask 1":
                    raise RequestError(setting, file, "not a mask file of erase-concept")
                shapes = read_shapes(metadata.pop("shapes"))
                bits = {name: tensors.get_tensor(name) for name in shapes}
        except RequestError:
            raise
        except (ValueError, LookupError, SafetensorError) as problem:
            raise RequestError(setting, file, f"not a readable mask: {problem}") from None
        for name, shape in shapes.items():
            weights = math.prod(shape)
            if bits[name].dtype != torch.uint8 or bits[name].shape != (-(-weights // 8),):
                raise RequestError(setting, file, f"damaged: {name} does not hold one bit per weight")
            if weights % 8 and int(bits[name][-1]) & (0xFF >> weights % 8):
                raise RequestError(setting, file, f"damaged: {name} has bits behind its last weight")
        return cls(bits, shapes, metadata)


def _check_shapes(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], setting: str, us: str, them: str
) -> None:
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            have, want = (list(s[name]) if name in s else "nothing" for s in (ours, theirs))
            raise RequestError(setting, name, f"does not fit: {us} has {have}, {them} has {want}")


def all_ones(shapes: Mapping[str, tuple[int, ...]]) -> Mask:
    """Return the mask that lets every weight of these shapes change."""
    ones = {name: torch.from_numpy(np.packbits(np.ones(int(np.prod(s)), bool))) for name, s in shapes.items()}
    return Mask(ones, dict(shapes))


def expand_to(mask: Mask, model: nn.Module) -> Mask:
    """Return the mask with an entry for every parameter of a model; those that it did not name are frozen."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    frozen = {name: torch.zeros(-(-int(np.prod(shape)) // 8), dtype=torch.uint8) for name, shape in shapes.items()}
    return Mask(frozen | mask.bits, shapes, mask.provenance)


def describe(mask: Mask) -> dict[str, Any]:
    """Return what ``mask-info`` prints: counts, density by kind of layer and by layer, and provenance."""
    family = mask.provenance.get("family")  # masks of older versions do not say it
    groups = FAMILIES.find(family).layers if family else UNET_LAYERS
    layers = mask.layers()
    kinds: dict[str, list[int]] = {}
    for name, (ones, weights) in layers.items():
        entry = kinds.setdefault(groups.group(name), [0, 0])
        entry[0] += ones
        entry[1] += weights
    return {
        "weights": mask.total,
        "salient": mask.count,
        "density": mask.density,
        "kinds": {kind: ones / weights for kind, (ones, weights) in sorted(kinds.items()) if weights},
        "layers": {name: ones / weights for name, (ones, weights) in layers.items() if weights},
        "provenance": mask.provenance,
    }
