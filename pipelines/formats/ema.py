"""The two sets of a UNet's weights in one file, live and averaged over the training (EMA), and the choice of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from erase_concept.errors import RequestError

# Two sets that differ in a matrix by more than this share of its norm are taken for two models: an average lies close
# to the live weights, while fine-tuning or erasing one of the two moves whole matrices.
WIDE = 0.01


def ema_key(key: str) -> str:
    """Return the name under which a checkpoint keeps the average over its training of a tensor of its UNet."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def choose_unet(
    tensors: Mapping[str, Tensor], names: Iterable[str], ema: bool | None, file: object
) -> tuple[dict[str, Tensor], str]:
    """Return a file's tensors with one set of the UNet's weights under ``names``, and a sentence on which was taken.

    ``names`` are those of the live weights. ``ema`` asks for the averages or the live ones; None takes the averages
    where the two are nearly alike, or the only set that is whole and sound. A file with one set gives that. The
    sentence is empty where the file has live weights alone.

    Raises RequestError when the set that is asked for is not whole or sound, or when none is asked for and the two are
    two models.
    """
    names = list(names)
    sets = {
        "averaged (EMA)": {name: tensors[ema_key(name)] for name in names if ema_key(name) in tensors},
        "live": {name: tensors[name] for name in names if name in tensors},
    }
    averaged, live = sets.values()
    if not averaged or not live:
        return {**tensors, **averaged}, "averaged (EMA) UNet, the only one in the file" if averaged else ""
    faults = {kind: _fault(found, names) for kind, found in sets.items()}
    if ema is None:
        sound = [kind for kind in sets if not faults[kind]]
        if len(sound) == 2 and (apart := difference(averaged, live)) > WIDE:
            allowed = f"{file} holds two UNets, averaged (EMA) and live, that differ by {apart:.1%} in a matrix"
            raise RequestError("ema", "(not given)", f"{allowed}: ema takes the averaged one, no-ema the live one")
        kind = sound[0] if sound else "live"
    else:
        kind = "averaged (EMA)" if ema else "live"
        if faults[kind]:
            raise RequestError("model", str(file), f"its {kind} UNet {faults[kind]}")
    other = next(one for one in sets if one != kind)
    if faults[other]:
        return {**tensors, **sets[kind]}, f"{kind} UNet taken; the {other} one {faults[other]}"
    apart = difference(averaged, live)
    return {**tensors, **sets[kind]}, f"{kind} UNet taken; the {other} one differs by {apart:.2%} at most in a matrix"


def difference(averaged: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> float:
    """Return the largest relative change of a matrix, |live - averaged| / |averaged| by the Frobenius norm.

    Vectors count only where there is no matrix: biases near zero change much for little. Other shapes differ wholly.
    """
    names = [name for name in averaged if averaged[name].ndim > 1] or list(averaged)
    if any(averaged[name].shape != live[name].shape for name in names):
        return float("inf")
    pairs = ((averaged[name].float(), live[name].float()) for name in names)
    return max(float((one - two).norm() / one.norm().clamp_min(1e-12)) for one, two in pairs)


def _fault(found: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Say why a set of weights cannot be a model's; empty for a whole and sound one."""
    if missing := [name for name in names if name not in found]:
        return f"is not whole ({missing[0]} is missing)"
    for name, value in found.items():
        if not bool(torch.isfinite(value.float()).all()):
            return f"is broken ({name} holds NaN or infinity)"
    if not any(bool(value.float().any()) for value in found.values()):
        return "is all zeros"
    return ""
