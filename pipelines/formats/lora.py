"""LoRA files: the change of a UNet in low rank, as A1111, ComfyUI and diffusers add it to the base model.

A LoRA adds ``up @ down`` to a layer's weight. Of all pairs of a given rank, the change's leading singular vectors come
nearest to it (Eckart and Young 1936). In large layers they are found by a randomised decomposition (Halko and others
2009), whose error is a little above the least one. A LoRA can change only the weights of linear and convolutional
layers. Changes of biases and norms are left out, and their share is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from erase_concept.errors import EraseError
from erase_concept.files import atomic_write
from erase_concept.pipelines.families.family import Family
from erase_concept.pipelines.formats.modelspec import kohya_base, kohya_network, write_content_hash
from erase_concept.pipelines.formats.prediction import prediction_of
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.formats.weights import check_same
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.progress import progress

Style = Literal["kohya", "diffusers"]
_EXACT = 256  # up to so many rows or columns a layer is decomposed exactly
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3

# Where each program looks for the layers of a LoRA: in modules whose diffusers' name has one of these parts, or, with
# none here, everywhere. sd-scripts (networks/lora.py) knows transformers, residual blocks and samplers alone.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "diffusers": (),
    "ComfyUI": (),
    "A1111 and Forge": (),
    "InvokeAI": (),
    "sd-scripts": (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers."),
}


@dataclass(frozen=True)
class Fit:
    """The relative error of a LoRA: the Frobenius norm of what it misses over that of the whole change.

    ``errors`` has it by rank: of the written file at its own rank, and of the best LoRA at lower ones. ``left_out`` is
    the part in biases and norms, which is the least error of any rank. ``layers`` counts the layers in the file,
    and ``found`` how many of them each program finds; with diffusers' keys only diffusers does.
    """

    errors: dict[int, float]
    left_out: float
    layers: int
    found: Mapping[str, int]


def save_lora(
    base: Diffusion,
    erased: nn.Module,
    file: str | Path,
    *,
    rank: int,
    style: Style,
    dtype: torch.dtype,
    about: dict[str, str],
) -> Fit:
    """Write the LoRA of a rank that is nearest to the change from the base's UNet to ``erased``, and read it back.

    All layers get the same rank, small ones filled up with zeros, and so the same scale: diffusers 0.42 takes a wrong
    scale for kohya's attention layers where ranks differ. The rank is no higher than the largest layer can use.
    ``about`` is written as metadata, beside kohya's.

    Raises EraseError, and leaves no file, when no such layer changed, the change is not finite, or what is read back is
    not what was written.
    """
    layers, names = lora_layers(base.unet), lora_names(base.unet, base.family, style)
    rank = min(rank, max(min(weight.flatten(1).shape) for weight in layers.values()))
    lower = [2**power for power in range(rank.bit_length()) if 2**power < rank]
    missed = dict.fromkeys([*lower, rank], 0.0)  # these three are squares of norms
    all_change = left_out = 0.0
    tensors: dict[str, Tensor] = {}
    after = dict(erased.named_parameters())
    written: list[str] = []
    for name, before in progress(list(base.unet.named_parameters()), "LoRA", len(after)):
        change = _change(before, after[name])
        size = float(change.square().sum(dtype=torch.float64))
        if not math.isfinite(size):
            raise EraseError(f"{name} changed to or from values that are no numbers: there is no LoRA of that")
        all_change += size
        if name not in layers:
            left_out += size
        elif size:
            up, down, squares = factors(change.flatten(1), rank)
            up, down = up.to(dtype), down.to(dtype)
            for low in lower:
                missed[low] += max(size - float(squares[:low].sum()), 0.0)
            missed[rank] += float((change.flatten(1) - up.to(change) @ down.to(change)).square().sum())
            written.append(name)
            up, down = up.reshape(len(change), rank, *[1] * (change.ndim - 2)), down.reshape(rank, *change.shape[1:])
            tensors |= _named(names[name], up.contiguous(), down.contiguous(), style)
    if not tensors:
        raise EraseError("no linear or convolutional layer changed: there is nothing that a LoRA could carry")
    errors = {r: ((left_out + square) / all_change) ** 0.5 for r, square in missed.items()}
    fit = Fit(errors, (left_out / all_change) ** 0.5, len(written), layers_found(written, style))
    told = {"relative_error": f"{fit.errors[rank]:.6f}", "left_out": f"{fit.left_out:.6f}"}
    kohya = kohya_base(base.family, prediction_of(base.scheduler)) | kohya_network(rank)
    with atomic_write(Path(file)) as partial:
        save_tensors(tensors, partial, {"format": "pt", **kohya, **about, **told})
        write_content_hash(partial)
        check_same(tensors, load_file(partial), Path(file))
    return fit


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest up [m, rank] and down [rank, n] to a matrix [m, n], and its leading squared singular values.

    The squared singular values come in falling order. Those of a float64 matrix are the eigenvalues of the smaller Gram
    matrix, exact to some 1e-8 of the largest. A float32 matrix whose rank is far above ``rank`` is decomposed at
    random, always with the same numbers, and misses up to 0.5 % more than the nearest. Each side gets the root of each
    singular value, so that neither holds numbers too small for fp16. A rank beyond the matrix's own is filled up with
    zeros.
    """
    matrix = change if change.shape[0] <= change.shape[1] else change.T
    if matrix.dtype == torch.float32 and 2 * (rank + _OVERSAMPLING) < len(matrix):
        with torch.random.fork_rng(devices=[]):  # the library takes no generator of ours
            torch.default_generator.manual_seed(0)
            left, values, _ = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        near, squares = left[:, :rank], values.double().square()
    else:
        matrix = matrix.double()
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
        near, squares = vectors.flip(1)[:, :rank], squares.flip(0)
    far = near.T @ matrix
    root = far.norm(dim=1).sqrt()
    near, far = near * root, far / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
    fill = rank - len(far)
    near, far = nn.functional.pad(near, (0, fill)), nn.functional.pad(far, (0, 0, 0, fill))
    up, down = (near, far) if matrix.shape == change.shape else (far.T, near.T)
    return up, down, squares.clamp(min=0)


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Return a weight's change: in float64, but in float32 where it is large and decomposed at random."""
    large = before.ndim > 1 and min(before.flatten(1).shape) > _EXACT
    kind = torch.float32 if large else torch.float64
    return after.detach().to("cpu", kind) - before.detach().to("cpu", kind)


def lora_layers(unet: nn.Module) -> dict[str, Tensor]:
    """Return by name the weights that a LoRA can change: [out, in], or [out, in, kernel, kernel]."""
    modules = ((name, m) for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return {f"{name}.weight": module.weight for name, module in modules}


def lora_names(unet: nn.Module, family: Family, style: Style) -> dict[str, str]:
    """Return the name that each weight's layer has in a LoRA: kohya names SDXL's layers as the original model does."""
    weights = list(lora_layers(unet))
    if style == "diffusers":
        return {weight: "unet." + weight.removesuffix(".weight") for weight in weights}
    places = {weight: weight for weight in weights}
    if family.single_file is not None and family.single_file.lora_names:
        layout = family.single_file.layouts["unet"]
        original = layout.names(unet.state_dict())
        places = {weight: original[weight].removeprefix(layout.prefix) for weight in weights}
    return {w: "lora_unet_" + place.removesuffix(".weight").replace(".", "_") for w, place in places.items()}


def layers_found(weights: Iterable[str], style: Style) -> dict[str, int]:
    """Return how many of a LoRA's layers each program finds, by the names of their weights.

    Keys of diffusers' style are for diffusers alone.
    """
    weights = list(weights)
    programs = PROGRAMS if style == "kohya" else {"diffusers": PROGRAMS["diffusers"]}
    return {
        program: sum(not inside or any(part in weight for part in inside) for weight in weights)
        for program, inside in programs.items()
    }


def _named(name: str, up: Tensor, down: Tensor, style: Style) -> dict[str, Tensor]:
    """Return a layer's tensors by their keys."""
    if style == "diffusers":
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    alpha = torch.tensor(float(len(down)))  # over the rank, that is the scale: one
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
