"""Checks an export alone, without the run that it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from erase_concept.errors import RequestError
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.exports import Models, check_export, erased_unets, export_format
from erase_concept.eval.verify.findings import Findings, VerifyRequest, files_in
from erase_concept.eval.verify.run import NO_ATTACKS
from erase_concept.eval.verify.weights import Weights
from erase_concept.pipelines.formats.modelspec import model_name
from erase_concept.pipelines.model import WeightsHash

_BASE, _ERASED = "base_unet_sha256", "erased_unet_sha256"
_SAID = ("method", "concept", _BASE, _ERASED, "mask_sha256")


def check_export_alone(request: VerifyRequest, base: str) -> Findings:
    """Check an export against its base model and what it says of itself; raises RequestError for what is none."""
    path = Path(request.model)
    if request.exports or request.reports:
        name = "exports" if request.exports else "reports"
        raise RequestError(name, (request.exports or request.reports)[0], "goes with a run, not with an export")
    kind = export_format(path)
    models, metadata = Models(base, request.ema, None), _metadata(path)
    checks = [check_export(path, path.name, models, None, {"format": kind})]
    about_base = {"name": model_name(base)}
    if checks[0].holds:  # both UNets can be read
        about_base["unet_sha256"] = _fp32_hash(models.base_weights("unet"))
        if kind != "delta":  # its hashes are in its dtype, and were compared
            checks += _check_hashes(path, models, metadata, about_base["unet_sha256"])
    untested = [
        NO_ATTACKS,
        "Whether the concept is gone: an export has no report. Verify the run that it comes from.",
        "Whether only the mask's weights changed: an export has no mask. Verify the run that it comes from.",
    ]
    if _BASE not in metadata:
        untested.append(f"Whether this is its base model: {path.name} does not say which one it was made from.")
    about = {
        "removed": {"concept": metadata.get("concept", "(the export does not say)")},
        "base": about_base,
        "said": {key: value for key, value in metadata.items() if key in _SAID},
        "format": kind,
    }
    return Findings(about, tuple(checks), subjects=tuple(files_in(path)), untested=tuple(untested))


def _fp32_hash(weights: Weights) -> str:
    hashed = WeightsHash(torch.float32)
    for name, value in weights:
        hashed.add(name, value)
    return hashed.hexdigest()


def _check_hashes(path: Path, models: Models, metadata: Mapping[str, str], found: str) -> Iterator[Check]:
    """Check the hashes of both UNets that an export states, where it states them."""
    if said := metadata.get(_BASE):
        what = "base model"
        if said == found:
            yield Check(what, True, f"its UNet has the hash that the export states ({found[:16]}...)")
        else:
            other = f"was made from a model whose UNet is {said[:16]}..., and this one's is {found[:16]}..."
            yield failed(what, path.name, other)
    if said := metadata.get(_ERASED):
        for weights in erased_unets(path, models):
            if (own := _own_hash(weights)) not in (None, said):
                yield failed(
                    "erased UNet", path.name, f"states the hash {said[:16]}..., and its UNet's is {own[:16]}..."
                )
                return


def _own_hash(weights: Weights) -> str | None:
    """Return the hash of weights in the dtype that all of them have; None where they have several."""
    hashed, dtypes = WeightsHash(), set[torch.dtype]()
    for name, value in weights:
        hashed.add(name, value)
        dtypes.add(value.dtype)
    return hashed.hexdigest() if len(dtypes) == 1 else None


def _metadata(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {}
    with safe_open(path, "pt") as stored:
        return dict(stored.metadata() or {})
