"""Checks that an export loads and is the run's erased model, rounded as it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.verify.beside_weights import check_beside_weights
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.folder import faults, first_other
from erase_concept.eval.verify.weights import Weights, differences, empty, first_difference
from erase_concept.files import file_sha256, relative
from erase_concept.pipelines.families.family import Family
from erase_concept.pipelines.formats.delta import FORMAT, moved_weights, open_delta
from erase_concept.pipelines.formats.ema import ema_key
from erase_concept.pipelines.formats.folder import INDEX, load_folder
from erase_concept.pipelines.formats.lora import Style, lora_layers, lora_names
from erase_concept.pipelines.formats.modelspec import content_hash
from erase_concept.pipelines.formats.prediction import V_PRED, ZTSNR, read_prediction
from erase_concept.pipelines.formats.single_file import original_weights
from erase_concept.pipelines.formats.tensors import open_tensors
from erase_concept.pipelines.formats.weights import each_tensor, is_safetensors
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import ModelConfigs, configs, locate, stored_weights
from erase_concept.pipelines.model import WeightsHash

LORA_TOLERANCE = 1e-3  # by so much the error of a LoRA may be above the one that its file states
_ADAPTERS = "lora_adapter_metadata"  # diffusers' own settings of a LoRA, which it reads where they are
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
        if (own := export_format(path)) != kind:
            return failed(what, name, f"is a {_NAMES.get(own, own)}")
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
        if metadata.get("format") != FORMAT:  # a delta's hash is of the base model in its dtype
            said["base_unet_sha256"] = info["base"]["unet"]
        for key, value in said.items():
            if metadata.get(key, value) != value:
                return f"its metadata says {key} {metadata[key][:40]}, run.json says {str(value)[:40]}"
    return ""


def _folder(path: Path, models: Models) -> tuple[str, str]:
    family = load_folder(path, str(path)).family
    for fault, file in faults(path, family):
        return "", f"{relative(file, path)} {fault}"
    if models.erased is not None and (name := first_other(path, models.erased, family)):
        return "", f"{name} says something else than the run's"
    found, fault = _parts(family, models, partial(stored_weights, path))
    if not fault and models.erased is None:
        for check in check_beside_weights(path, path.name, models.base, models.ema, ()):
            fault = fault or ("" if check.holds is not False else f"{check.what} {check.found}")
            found += "" if check.holds else f"; {check.what}: {check.found}"
    return found, fault


def _single_file(path: Path, models: Models) -> tuple[str, str]:
    """Compare both of the file's UNets, where it has an average beside the live one."""
    known = models.configs()
    with safe_open(path, "pt") as stored:
        keys, metadata = set(stored.keys()), stored.metadata() or {}
    own = known.components["scheduler"].get("prediction_type", "epsilon")
    if (marked := read_prediction(path, keys, metadata).type) not in (None, own):
        return "", f"is marked as a model of {marked}, and it is one of {own}"
    if strange := _strange(path, keys, known, models):
        return "", f"holds {strange}, which is no weight of the model"
    for weights in _single_file_weights(path, keys, known):
        found, fault = _parts(known.family, models, weights)
        if fault:
            break
    return found, fault


def _single_file_weights(path: Path, keys: set[str], known: ModelConfigs) -> Iterator[Callable[[str], Weights]]:
    """Yield what gives a single file's weights of a component, once for each UNet in it."""
    averaged = any(key.startswith("model_ema.") for key in keys)
    for ema in (True, False) if averaged else (None,):
        options: dict[str, Any] = {"ema": ema, "like": (known.family, known.components)}
        yield partial(original_weights, path, str(path), **options)


def erased_unets(path: Path, models: Models) -> Iterator[Weights]:
    """Yield the weights of each UNet that an export holds: none of a LoRA or a delta."""
    kind = export_format(path)
    if kind == "unet":
        yield sorted_tensors(path)
    elif kind == "single-file":
        with safe_open(path, "pt") as stored:
            keys = set(stored.keys())
        for weights in _single_file_weights(path, keys, models.configs()):
            yield weights("unet")


def _strange(path: Path, keys: set[str], known: ModelConfigs, models: Models) -> str:
    """Return the first tensor of a single file that is neither the model's nor the base model's file's; "" for none."""
    layouts = known.family.single_file
    assert layouts is not None  # the weights of such a file are about to be compared
    own = {V_PRED, ZTSNR}
    for part, layout in layouts.layouts.items():
        names = layout.names(empty(known, part).state_dict()).values()
        own |= {name if name in keys else name.replace("text_model.", "", 1) for name in names}
        own |= {ema_key(name) for name in names} if part == "unet" else set()
    left = sorted(keys - own)
    base = locate(models.base) if left else path
    if not left or not base.is_file() or not is_safetensors(base):
        return next(iter(left), "")
    with safe_open(base, "pt") as before, safe_open(path, "pt") as now:
        there = set(before.keys())
        for name in left:  # an exported copy keeps what else the base model's file holds
            value = now.get_tensor(name)
            if name not in there or not torch.equal(before.get_tensor(name).to(value.dtype), value):
                return name
    return ""


def _parts(family: Family, models: Models, stored: Callable[[str], Weights]) -> tuple[str, str]:
    """Compare every component with the run's, or where the run is not at hand all but one with the base model's."""
    changed: dict[str, str] = {}
    for part in (name for name, one in family.components.items() if one.make):
        if models.erased is not None:
            if name := first_difference(models.erased_weights(part), stored(part)):
                return "", f"{part}: {name} is not the run's, rounded to the file's dtype"
            continue
        name, broken = differences(models.base_weights(part), stored(part))
        if broken:
            return "", f"{part}: {broken} holds NaN or infinity"
        changed |= {part: name} if name else {}
    if models.erased is not None:
        return "loads, and every weight is the run's, rounded to the file's dtype", ""
    if not changed:
        return "", "its weights are the base model's: nothing was erased"
    erased = "unet" if "unet" in changed else "text_encoder"  # what a method may change, and never both
    if other := next((part for part in changed if part != erased), ""):
        return "", f"{other}: {changed[other]} is not the base model's, rounded to the file's dtype"
    words = {"unet": "UNet", "text_encoder": "text encoder"}[erased]
    whole = f"all but the {words} is the base model's, bit for bit"
    return f"loads; {whole}; the {words} differs (first in {changed[erased]})", ""


def _unet(path: Path, models: Models) -> tuple[str, str]:
    if models.erased is not None:
        name = first_difference(models.erased_weights("unet"), sorted_tensors(path))
        return "every weight is the run's, rounded to the file's dtype", name and f"{name} is not the run's"
    name, broken = differences(models.base_weights("unet"), sorted_tensors(path))
    if broken:
        return "", f"{broken} holds NaN or infinity"
    fault = "" if name else "it is the base model's UNet: nothing was erased"
    return f"has the base model's layers; differs from it (first in {name})", fault


def sorted_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a safetensors file's tensors in the order of their names."""
    tensors = dict(each_tensor(file))
    for name in sorted(tensors):
        yield name, tensors.pop(name)


def _delta(path: Path, models: Models) -> tuple[str, str]:
    delta = open_delta(path)
    with safe_open(path, "pt") as stored:
        keys = set(stored.keys())
    moves = {key.rpartition(":")[0] for key in keys} & delta.shapes.keys()
    if strange := sorted(keys - {f"{name}:{part}" for name in moves for part in ("changed", "steps", "wide")}):
        return "", f"holds {strange[0]}, which is no part of a delta of the UNet"
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
    if _ADAPTERS in metadata:
        return "", f"its metadata has {_ADAPTERS}, by which diffusers scales it otherwise"
    changes, fault = _lora_changes(dict(each_tensor(path)), models.configs())
    if fault or models.erased is None:
        return f"{len(changes)} layers of the base model have a change in it; its fit needs the run", fault
    error = _lora_error(changes, models)
    said = float(metadata.get("relative_error", "nan"))
    found = f"it misses {error:.4f} of the change by its Frobenius norm, and says {said:.4f}"
    if not error < 1:
        return "", f"{found}: the base model itself misses no more"
    return ("", found) if not error <= said + LORA_TOLERANCE else (found, "")


def _lora_changes(tensors: dict[str, Tensor], model: ModelConfigs) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """Return by the UNet's parameters what a LoRA adds to them as up and down, the scale in up; and what is wrong.

    A layer's scale is its alpha, where it has one, over the rank.
    """
    style: Style = "diffusers" if any(key.endswith(".lora_A.weight") for key in tensors) else "kohya"
    unet = empty(model, "unet")
    names, layers = lora_names(unet, model.family, style), lora_layers(unet)
    up_key, down_key = ("lora_B", "lora_A") if style == "diffusers" else ("lora_up", "lora_down")
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    for weight, shape in ((weight, value.shape) for weight, value in layers.items()):
        up, down = (tensors.pop(f"{names[weight]}.{key}.weight", None) for key in (up_key, down_key))
        alpha = tensors.pop(f"{names[weight]}.alpha", None) if style == "kohya" and up is not None else None
        if up is None and down is None:
            continue
        if up is None or down is None or up.ndim != len(shape) or down.ndim != len(shape):
            return {}, f"has no change of the right shape for {weight}"
        up, down = up.float().flatten(1), down.float().flatten(1)
        if (len(up), up.shape[1], down.shape[1]) != (shape[0], len(down), shape[1:].numel()) or not len(down):
            return {}, f"has no change of the right shape for {weight}"
        if alpha is not None and alpha.numel() != 1:
            return {}, f"has an alpha that is no number for {weight}"
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        if not bool((up * scale).isfinite().all()) or not bool(down.isfinite().all()):
            return {}, "holds numbers that are not finite"
        changes[weight] = (up * scale, down)
    if tensors:
        return {}, f"holds {min(tensors)}, which is no part of a LoRA of the base model's UNet"
    return changes, "" if changes else "changes no layer"


def _lora_error(changes: Mapping[str, tuple[Tensor, Tensor]], models: Models) -> float:
    """Return the Frobenius norm of what a LoRA misses of the run's change, over that of the change."""
    missed = whole = 0.0
    for (name, before), (_, after) in zip(models.base_weights("unet"), models.erased_weights("unet"), strict=True):
        change = after.double() - before.double()
        whole += float(change.square().sum())
        if name in changes:
            up, down = changes[name]
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
