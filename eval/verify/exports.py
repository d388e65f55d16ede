"""Checks that an export loads and is the run's erased model, rounded as it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.weights import Weights, first_difference
from erase_concept.files import file_sha256
from erase_concept.pipelines.families.family import Family
from erase_concept.pipelines.formats.delta import FORMAT, moved_weights, open_delta
from erase_concept.pipelines.formats.folder import INDEX, load_folder
from erase_concept.pipelines.formats.lora import Style, lora_layers, lora_names
from erase_concept.pipelines.formats.modelspec import content_hash
from erase_concept.pipelines.formats.single_file import original_weights
from erase_concept.pipelines.formats.tensors import open_tensors
from erase_concept.pipelines.formats.weights import each_tensor
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import ModelConfigs, configs, stored_weights
from erase_concept.pipelines.model import WeightsHash

LORA_TOLERANCE = 1e-3  # by so much the error of a LoRA may be above the one that its file states
_NAMES = {"diffusers": "diffusers folder", "unet": "UNet file", "single-file": "single file", "lora": "LoRA"}


@dataclass(frozen=True)
class Models:
    """The models that an export is compared with, by name or path.

    ``erased`` is the folder of a run's pipeline, in fp32; None where the run is not at hand.
    """

    base: str
    ema: bool | None
    erased: Path | None

    def configs(self) -> ModelConfigs:
        """Return the family and the configurations of both."""
        return configs(self.base, ema=self.ema) if self.erased is None else configs(self.erased)

    def base_weights(self, part: str) -> Weights:
        """Return the base model's weights of a component."""
        return stored_weights(self.base, part, ema=self.ema)

    def erased_weights(self, part: str) -> Weights:
        """Return the run's weights of a component."""
        assert self.erased is not None  # asked for where the run is at hand
        return stored_weights(self.erased, part)


def export_format(path: Path) -> str:
    """Return the format of an export; raises RequestError for what is none."""
    if (path / INDEX).is_file():
        return "diffusers"
    try:
        with open_tensors(path) as stored:
            keys, metadata = list(stored.keys()), stored.metadata() or {}
    except (OSError, ValueError, SafetensorError) as problem:
        raise RequestError("model", path, f"is no run, and no export that can be read: {problem}") from None
    if metadata.get("format") == FORMAT:
        return "delta"
    if any(key.endswith((".lora_A.weight", ".lora_down.weight")) for key in keys):
        return "lora"
    return "single-file" if any(key.startswith(("model.diffusion_model.", "model_ema.")) for key in keys) else "unet"


def check_export(
    path: Path, name: str, models: Models, info: Mapping[str, Any] | None, entry: Mapping[str, Any]
) -> Check:
    """Check one export: that its file is the one that was written, that it loads, and that its weights are right.

    ``info`` is the run's run.json, and ``entry`` what it says of the export; both are empty where the run is not at
    hand, and then it is compared with the base model and with what it says of itself.
    """
    kind = str(entry.get("format") or export_format(path))
    what = f"export {path.name} ({_NAMES.get(kind, kind)})"
    try:
        if entry.get("sha256") and (found := file_sha256(path)) != entry["sha256"]:
            return failed(what, name, f"its SHA-256 is {found[:16]}..., run.json says {entry['sha256'][:16]}...")
        if path.is_file() and (fault := _check_metadata(path, info)):
            return failed(what, name, fault)
        with silence_hub_logs():
            found, fault = _CHECKS[kind](path, models)
    except (RequestError, EraseError, ValueError, OSError, SafetensorError, KeyError) as problem:
        reason = problem.allowed if isinstance(problem, RequestError) else str(problem)
        return failed(what, name, f"does not load: {reason}")
    return failed(what, name, fault) if fault else Check(what, True, found)


def _check_metadata(file: Path, info: Mapping[str, Any] | None) -> str:
    """Say what of a file's metadata is not true; "" where all is."""
    with open_tensors(file) as stored:
        metadata = stored.metadata() or {}
    own = {
        key: metadata[key].removeprefix("0x") for key in ("modelspec.hash_sha256", "sshs_model_hash") if key in metadata
    }
    if own and set(own.values()) != {content_hash(file)}:
        return f"its tensors are not those of which {next(iter(own))} is the hash"
    if info:
        mask = info["mask"]["sha256"] if info["mask"] else "none"
        said = {"method": info["method"], "concept": info["concept"], "mask_sha256": mask}
        for key, value in said.items():
            if metadata.get(key, value) != value:
                return f"its metadata says {key} {metadata[key][:40]}, run.json says {str(value)[:40]}"
    return ""


def _folder(path: Path, models: Models) -> tuple[str, str]:
    family = load_folder(path, str(path)).family
    return _parts(family, models, partial(stored_weights, path))


def _single_file(path: Path, models: Models) -> tuple[str, str]:
    """Compare both of the file's UNets, where it has an average beside the live one."""
    known = models.configs()
    with safe_open(path, "pt") as stored:
        averaged = any(key.startswith("model_ema.") for key in stored.keys())
    for ema in (True, False) if averaged else (None,):
        options: dict[str, Any] = {"ema": ema, "like": (known.family, known.components)}
        found, fault = _parts(known.family, models, partial(original_weights, path, str(path), **options))
        if fault:
            break
    return found, fault


def _parts(family: Family, models: Models, stored: Callable[[str], Weights]) -> tuple[str, str]:
    """Compare every component with the run's, or where the run is not at hand all but the UNet with the base's."""
    changed = ""
    for part in (name for name, one in family.components.items() if one.make):
        if models.erased is None and part == "unet":
            if not (changed := first_difference(models.base_weights(part), stored(part))):
                return "", "its UNet is the base model's: nothing was erased"
            continue
        ours, whose = models.base_weights(part), "the base model's"
        if models.erased is not None:
            ours, whose = models.erased_weights(part), "the run's"
        if name := first_difference(ours, stored(part)):
            return "", f"{part}: {name} is not {whose}, rounded to the file's dtype"
    if models.erased is not None:
        return "loads, and every weight is the run's, rounded to the file's dtype", ""
    return f"loads; all but the UNet is the base model's, bit for bit; the UNet differs (first in {changed})", ""


def _unet(path: Path, models: Models) -> tuple[str, str]:
    whole = models.erased is not None
    name = first_difference(
        models.erased_weights("unet") if whole else models.base_weights("unet"), sorted_tensors(path)
    )
    if whole:
        return ("every weight is the run's, rounded to the file's dtype", name and f"{name} is not the run's")
    fault = "" if name else "it is the base model's UNet: nothing was erased"
    return f"has the base model's layers; differs from it (first in {name})", fault


def sorted_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a safetensors file's tensors in the order of their names."""
    tensors = dict(each_tensor(file))
    for name in sorted(tensors):
        yield name, tensors.pop(name)


def _delta(path: Path, models: Models) -> tuple[str, str]:
    delta = open_delta(path)
    before, after = WeightsHash(), WeightsHash()

    def counted(hashed: WeightsHash, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            rounded = value.to(delta.dtype)
            hashed.add(name, rounded)
            yield name, rounded

    moved = counted(after, moved_weights(delta, counted(before, models.base_weights("unet"))))
    if models.erased is not None:
        if name := first_difference(models.erased_weights("unet"), moved):
            return "", f"applied to the base model it does not lead to the run's {name}"
    else:
        for _ in moved:
            pass
    if before.hexdigest() != delta.base:
        return "", f"is for another base model, whose UNet is {delta.base[:16]}..."
    if after.hexdigest() != delta.erased:
        return "", "applied to the base model it leads to another UNet than it promises"
    return "applied to the base model it leads to the UNet that it promises, bit for bit", ""


def _lora(path: Path, models: Models) -> tuple[str, str]:
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata() or {}
    tensors = dict(each_tensor(path))
    style: Style = "diffusers" if any(key.endswith(".lora_A.weight") for key in tensors) else "kohya"
    found = models.configs()
    make = found.family.components["unet"].make
    assert make is not None  # every family's UNet has weights
    with torch.device("meta"):
        unet: nn.Module = make(found.components["unet"])
    keys = ("lora_B", "lora_A") if style == "diffusers" else ("lora_up", "lora_down")
    names, layers = lora_names(unet, found.family, style), lora_layers(unet)
    places = {names[weight]: weight for weight in layers}
    inside = {key.rpartition(f".{keys[0]}.")[0] for key in tensors if f".{keys[0]}." in key}
    if strange := sorted(inside - places.keys()):
        return "", f"{strange[0]} is no layer of the base model"
    changes = {
        places[name]: (tensors[f"{name}.{keys[0]}.weight"], tensors[f"{name}.{keys[1]}.weight"]) for name in inside
    }
    if not all(bool(one.isfinite().all()) for pair in changes.values() for one in pair):
        return "", "holds numbers that are not finite"
    if models.erased is None:
        return f"{len(changes)} layers of the base model have a change in it; its fit needs the run", ""
    error = _lora_error(changes, models)
    said = float(metadata.get("relative_error", "nan"))
    if not error <= said + LORA_TOLERANCE:
        return "", f"it misses {error:.4f} of the change by its Frobenius norm, and says {said:.4f}"
    return f"it misses {error:.4f} of the change by its Frobenius norm, and says {said:.4f}", ""


def _lora_error(changes: Mapping[str, tuple[Tensor, Tensor]], models: Models) -> float:
    """Return the Frobenius norm of what a LoRA misses of the run's change, over that of the change."""
    missed = whole = 0.0
    for (name, before), (_, after) in zip(models.base_weights("unet"), models.erased_weights("unet"), strict=True):
        change = after.double() - before.double()
        whole += float(change.square().sum())
        if name in changes:
            up, down = (one.float().flatten(1) for one in changes[name])
            change = change - (up @ down).view(change.shape)
        missed += float(change.square().sum())
    return float((missed / whole) ** 0.5) if whole else 0.0


_CHECKS: dict[str, Callable[[Path, Models], tuple[str, str]]] = {
    "diffusers": _folder,
    "single-file": _single_file,
    "unet": _unet,
    "delta": _delta,
    "lora": _lora,
}
