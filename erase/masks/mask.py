"""Masks: which weights an erasure may change, one bit per weight.

A mask of 860 million weights takes 107 MB and two passes over the scores: the k-th largest score is found by counting
bit patterns (a non-negative float orders like the integer with the same bits), so nothing is sorted, copied or
concatenated, and the ranks of a distributed run exchange counts instead of gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erase_concept.errors import RequestError
from erase_concept.files import atomic_write

if TYPE_CHECKING:
    from transformers import CLIPTextModel

# Parts of a UNet that an erasure may be confined to; see ``in_scope``.
SCOPES = ("full", "cross-attention", "self-attention", "non-cross-attention")
TEXT_ENCODER = "text-encoder"  # the one scope outside the UNet: the token embeddings of the concept's own words

Part = Literal["unet", "text_encoder"]  # of a model, by diffusers' names, that an erasure may change

_CHUNK = 1 << 18  # scores looked at together: what is made of them stays in the cache, and needs no new pages
_LOW_BITS = 16

# Given one rank's counts int64 [m], return those of all ranks int64 [ranks, m], and this rank's place among them.
Exchange = Callable[[Tensor], tuple[Tensor, int]]


def alone(counts: Tensor) -> tuple[Tensor, int]:
    """Exchange counts in a run of a single process."""
    return counts[None], 0


@dataclass(frozen=True, eq=False)
class Mask:
    """One bit per weight of the named parameters; a parameter that is not named is frozen as a whole.

    ``bits[name]`` is uint8 [ceil(weights / 8)], the first weight in the highest bit; ``provenance`` holds strings that
    say where the mask comes from.
    """

    bits: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def part(self) -> Part:
        """The part of the model that it is a mask of."""
        return "text_encoder" if any(name.endswith("token_embedding.weight") for name in self.shapes) else "unet"

    @property
    def total(self) -> int:
        """Weights that the mask speaks of."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def count(self) -> int:
        """Weights that may change."""
        return sum(self._ones(name) for name in self.bits)

    @property
    def density(self) -> float:
        """Share of the weights that may change."""
        return self.count / self.total

    def _ones(self, name: str) -> int:
        return int(np.unpackbits(self.bits[name].numpy()).sum(dtype=np.int64))

    def dense(self, name: str) -> Tensor:
        """Return one parameter's mask as a boolean tensor of the parameter's shape."""
        shape = self.shapes[name]
        flat = np.unpackbits(self.bits[name].numpy(), count=int(np.prod(shape)))
        return torch.from_numpy(flat.astype(bool)).view(shape)

    def layers(self) -> dict[str, tuple[int, int]]:
        """Return for each parameter how many of its weights may change, and how many it has."""
        return {name: (self._ones(name), int(np.prod(shape))) for name, shape in self.shapes.items()}

    def check(self, model: nn.Module, *, argument: str = "--mask") -> None:
        """Raise RequestError when the mask was made for another model, naming the first parameter that differs."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        _check_shapes(self.shapes, shapes, argument, "the mask", "the model")

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
            save_file(self.bits, partial, metadata)

    @classmethod
    def load(cls, file: Path, *, argument: str = "--mask") -> Mask:
        """Read a mask; raises RequestError when the file is missing, damaged or no mask."""
        try:
            with safe_open(file, "pt") as tensors:
                metadata: dict[str, str] = dict(tensors.metadata() or {})
                if metadata.pop("format", "") != "erase-concept mask 1":
                    raise RequestError(argument, file, "not a mask file of erase-concept")
                shapes = {name: tuple(shape) for name, shape in json.loads(metadata.pop("shapes")).items()}
                bits = {name: tensors.get_tensor(name) for name in shapes}
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as problem:
            raise RequestError(argument, file, f"not a readable mask: {problem}") from None
        for name, shape in shapes.items():
            weights = int(np.prod(shape))
            if bits[name].dtype != torch.uint8 or bits[name].numel() != -(-weights // 8):
                raise RequestError(argument, file, f"damaged: {name} does not hold one bit per weight")
            if weights % 8 and int(bits[name][-1]) & (0xFF >> weights % 8):
                raise RequestError(argument, file, f"damaged: {name} has bits behind its last weight")
        return cls(bits, shapes, metadata)


def _check_shapes(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], argument: str, us: str, them: str
) -> None:
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            have, want = (list(s[name]) if name in s else "nothing" for s in (ours, theirs))
            raise RequestError(argument, name, f"does not fit: {us} has {have}, {them} has {want}")


def keep_count(density: float, total: int) -> int:
    """Return how many of ``total`` weights a mask of this density keeps, rounded to the nearest."""
    return round(density * total)


def top_k(scores: Mapping[str, Tensor], k: int, *, exchange: Exchange = alone) -> Mask:
    """Return the mask of exactly k ones over the k largest scores of all parameters taken together.

    ``scores`` are non-negative float tensors by parameter name. Among equal scores the earlier ones win, in the order
    of the mapping and within it of the flattened tensor. In a distributed run each rank holds a consecutive share of
    the parameters, k is counted over all of them, and ``exchange`` gathers the ranks' counts.

    Raises ValueError when k is out of range or a score is negative or not a number.
    """
    total = int(exchange(torch.tensor([sum(s.numel() for s in scores.values())]))[0].sum())
    if not 0 <= k <= total:
        raise ValueError(f"k must be between 0 and {total}, not {k}")
    high, above, _ = _find(scores, k, exchange, lambda bits: bits >> _LOW_BITS, 1 << 15, check=True)
    low, above, ties = _find(
        scores,
        k,
        exchange,
        lambda bits: (bits & 0xFFFF)[bits >> _LOW_BITS == high],
        1 << _LOW_BITS,
        already=above,
    )
    threshold = (high << _LOW_BITS) | low
    all_ties, rank = exchange(torch.tensor([ties]))
    # Of the weights at the threshold, this many are taken here: what is left once earlier ranks took theirs.
    wanted = k - above - int(all_ties[:rank].sum())
    packed = {}
    for name, score in scores.items():
        parts = []
        for bits in _patterns(score):
            chosen, equal = bits > threshold, bits == threshold
            chosen |= equal & (equal.cumsum(0) <= wanted)
            wanted -= int(equal.sum())
            parts.append(np.packbits(chosen.numpy()))
        packed[name] = torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.uint8))
    return Mask(packed, {name: tuple(score.shape) for name, score in scores.items()})


def _patterns(score: Tensor) -> Iterator[Tensor]:
    """Yield a score's bit patterns as int32, piece by piece."""
    flat = score.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        # Adding zero turns -0.0, whose pattern is negative, into 0.0.
        yield (flat[start : start + _CHUNK].float().cpu() + 0.0).view(torch.int32)


def _find(
    scores: Mapping[str, Tensor],
    k: int,
    exchange: Exchange,
    digit: Callable[[Tensor], Tensor],
    size: int,
    *,
    already: int = 0,
    check: bool = False,
) -> tuple[int, int, int]:
    """Return the digit at which counting from the largest down reaches k, and how many scores lie above it.

    And how many scores of this rank alone have it.
    """
    counts = torch.zeros(size, dtype=torch.int64)
    infinity = 0x7F800000
    for name, score in scores.items():
        for bits in _patterns(score):
            if check and bool(((bits < 0) | (bits > infinity)).any()):
                raise ValueError(f"scores must be numbers of at least 0, and {name} has others")
            counts += torch.bincount(digit(bits), minlength=size)
    own, counts = counts, exchange(counts)[0].sum(0)
    reached = already + counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, k)) if k > already else 0
    place = min(place, size - 1)
    value = size - 1 - place
    return value, int(reached[place]) - int(counts[value]), int(own[value])


def random(model: nn.Module, density: float, seed: int, scope: str = "full") -> Mask:
    """Return a mask over a random choice of the scope's weights, a share of them: the control for saliency."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in in_scope(model, scope).items()}
    return expand_to(top_k(scores, keep_count(density, sum(s.numel() for s in scores.values()))), model)


def in_scope(model: nn.Module, scope: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of one of ``SCOPES``, by name.

    Cross-attention is every parameter of diffusers' ``attn2``, self-attention of ``attn1``. Raises RequestError for
    another scope.
    """
    if scope not in SCOPES:
        raise RequestError("--scope", scope, f"allowed: {', '.join(SCOPES)}")
    word = {"cross-attention": ".attn2.", "self-attention": ".attn1."}.get(scope)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if scope == "non-cross-attention":
        return {name: shape for name, shape in shapes.items() if ".attn2." not in name}
    return {name: shape for name, shape in shapes.items() if word is None or word in name}


def all_ones(shapes: Mapping[str, tuple[int, ...]]) -> Mask:
    """Return a mask of ones alone."""
    ones = {name: torch.from_numpy(np.packbits(np.ones(int(np.prod(s)), bool))) for name, s in shapes.items()}
    return Mask(ones, dict(shapes))


def token_rows(encoder: CLIPTextModel, tokens: Tensor) -> Mask:
    """Return the mask of a text encoder that allows the embeddings of these tokens, int64 [n], and nothing else."""
    table: Any = encoder.get_input_embeddings().weight
    name = next(name for name, p in encoder.named_parameters() if p is table)
    rows = torch.zeros(table.shape, dtype=torch.bool)
    rows[tokens] = True
    return expand_to(Mask({name: torch.from_numpy(np.packbits(rows.numpy()))}, {name: tuple(table.shape)}), encoder)


def expand_to(mask: Mask, model: nn.Module) -> Mask:
    """Return a mask over all of a model's parameters: those that it does not name are frozen as a whole."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    frozen = {name: torch.zeros(-(-int(np.prod(shape)) // 8), dtype=torch.uint8) for name, shape in shapes.items()}
    return Mask(frozen | mask.bits, shapes, mask.provenance)


def bottom_k(scores: Mapping[str, Tensor], k: int) -> Mask:
    """Return the mask of exactly k ones over the k smallest scores: everything but the largest rest."""
    total = sum(score.numel() for score in scores.values())
    top = top_k(scores, total - k)
    return Mask((all_ones(top.shapes) - top).bits, top.shapes)


def describe(mask: Mask) -> dict[str, Any]:
    """Return what ``mask-info`` prints: counts, density by kind of layer and by layer, and provenance."""
    layers = mask.layers()
    kinds: dict[str, list[int]] = {}
    for name, (ones, weights) in layers.items():
        entry = kinds.setdefault(_kind(name), [0, 0])
        entry[0] += ones
        entry[1] += weights
    return {
        "weights": mask.total,
        "salient": mask.count,
        "density": mask.density,
        "kinds": {kind: ones / weights for kind, (ones, weights) in sorted(kinds.items())},
        "layers": {name: ones / weights for name, (ones, weights) in layers.items() if weights},
        "provenance": mask.provenance,
    }


def _kind(name: str) -> str:
    """Name the kind of layer a UNet parameter belongs to."""
    if "attn2" in name:
        return "cross-attention"
    if "attn1" in name:
        return "self-attention"
    if "attentions" in name:
        return "other transformer"
    return "resnet" if "resnets" in name else "other"
