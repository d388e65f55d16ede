"""Checks an export alone, without the run that it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from erase_concept.errors import RequestError
from erase_concept.eval.verify.exports import Models, check_export, export_format
from erase_concept.eval.verify.findings import Findings, VerifyRequest, files_in
from erase_concept.eval.verify.run import NO_ATTACKS
from erase_concept.pipelines.formats.modelspec import model_name

_SAID = ("method", "concept", "base_unet_sha256", "erased_unet_sha256", "mask_sha256")


def check_export_alone(request: VerifyRequest, base: str) -> Findings:
    """Check an export against its base model and what it says of itself; raises RequestError for what is none."""
    path = Path(request.model)
    if request.exports or request.reports:
        name = "exports" if request.exports else "reports"
        raise RequestError(name, (request.exports or request.reports)[0], "goes with a run, not with an export")
    kind = export_format(path)
    check = check_export(path, path.name, Models(base, request.ema, None), None, {"format": kind})
    untested = [
        NO_ATTACKS,
        "Whether the concept is gone: an export has no report. Verify the run that it comes from.",
        "Whether only the mask's weights changed: an export has no mask. Verify the run that it comes from.",
    ]
    about = {
        "removed": {"concept": _metadata(path).get("concept", "(the export does not say)")},
        "base": {"name": model_name(base)},
        "said": {key: value for key, value in _metadata(path).items() if key in _SAID},
        "format": kind,
    }
    return Findings(about, (check,), subjects=tuple(files_in(path)), untested=tuple(untested))


def _metadata(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {}
    with safe_open(path, "pt") as stored:
        return dict(stored.metadata() or {})
