"""Prediction type and zero terminal SNR of a single file: the marks by which programs tell them, read and written.

A file holds weights alone, which do not show how the model is to be sampled. Programs look for these marks:

- the tensors ``v_pred`` and ``ztsnr``, whose values do not matter (ComfyUI, stable-diffusion.cpp);
- ``modelspec.prediction_type`` and ``modelspec.architecture`` in the metadata (Stability AI's ModelSpec);
- a YAML file of the same name beside it, as the original code's configurations (A1111).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase_concept.errors import RequestError
from erase_concept.files import read_yaml
from erase_concept.pipelines.formats.scheduler import ZERO_SNR

V_PRED, ZTSNR = "v_pred", "ztsnr"
_MODELSPEC = "modelspec.prediction_type"
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max")
_ZERO_SNR_OPTIONS = ("zero_terminal_snr", ZERO_SNR, "ztsnr", "zsnr")


@dataclass(frozen=True)
class Prediction:
    """What a file says of its model: the prediction type, None where it does not, and zero terminal SNR."""

    type: str | None = None
    zero_snr: bool = False

    def scheduler(self) -> dict[str, Any]:
        """Return the values of a scheduler's configuration that follow.

        With zero terminal SNR sampling has to begin at the last time step (arXiv 2305.08891), hence the spacing.
        """
        values: dict[str, Any] = {} if self.type is None else {"prediction_type": self.type}
        if self.zero_snr:
            values |= {ZERO_SNR: True, "timestep_spacing": "trailing"}
        return values


def read_prediction(file: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> Prediction:
    """Return what the marks of a checkpoint say; a YAML file beside it is taken before those in the file.

    Raises RequestError where the marks in the file contradict each other, say what no family here can do, or the YAML
    file cannot be read.
    """
    beside = _beside(file)
    keys = set(keys)
    if edm := next((key for key in _EDM if key in keys), None):
        raise RequestError("model", file, f"has the key {edm}: an EDM model, which is not supported")
    said: dict[str, str] = {}
    if V_PRED in keys:
        said[f"the key {V_PRED}"] = "v_prediction"
    if found := metadata.get(_MODELSPEC, "").strip().lower():
        types = {"v": "v_prediction", "eps": "epsilon"}
        said[_MODELSPEC] = types.get(found.partition("_")[0].partition("-")[0], found)
    if metadata.get("modelspec.architecture", "").endswith("-768-v"):
        said["modelspec.architecture"] = "v_prediction"
    if beside.type is not None:
        return beside
    if len(set(said.values())) > 1:
        what = ", ".join(f"{mark} says {value}" for mark, value in said.items())
        how = f"put {file.stem}.yaml beside it with 'model: {{params: {{parameterization: v}}}}' (or eps)"
        raise RequestError("model", file, f"its marks contradict each other: {what}; {how}")
    kind = next(iter(said.values()), None)
    if kind not in (None, "epsilon", "v_prediction"):
        raise RequestError("model", file, f"{_MODELSPEC} is {kind}; allowed: epsilon, v")
    if ZTSNR in keys and kind == "epsilon":
        raise RequestError("model", file, f"has the key {ZTSNR}, but predicts the noise: zero SNR needs v_prediction")
    return Prediction(kind, beside.zero_snr or (ZTSNR in keys and kind is not None))


def prediction_of(scheduler: Any) -> Prediction:
    """Return the prediction type of a scheduler, and whether its last time step is noise alone."""
    config = scheduler.config
    return Prediction(str(config.prediction_type), bool(config.get(ZERO_SNR)))


def marks(prediction: Prediction) -> dict[str, Tensor]:
    """Return the tensors that mark a file: empty, as in published ones."""
    wanted = {V_PRED: prediction.type == "v_prediction", ZTSNR: prediction.zero_snr}
    return {key: torch.zeros(0) for key, true in wanted.items() if true}


def prediction_metadata(prediction: Prediction) -> dict[str, str]:
    """Return the metadata that mark a file."""
    return {_MODELSPEC: "v" if prediction.type == "v_prediction" else "epsilon"}


def _beside(file: Path) -> Prediction:
    """Return what the YAML file of a checkpoint's name says, in the layouts of SD 1.x and 2.x, and of XL."""
    beside = next((one for suffix in (".yaml", ".yml") if (one := file.with_suffix(suffix)).is_file()), None)
    if beside is None:
        return Prediction()
    try:
        model = read_yaml(beside)["model"]["params"]
        kind = {"v": "v_prediction", "eps": "epsilon"}.get(str(model.get("parameterization", "")))
        denoiser = model.get("denoiser_config", {}).get("params", {})
        if scaling := str(denoiser.get("scaling_config", {}).get("target", "")).rpartition(".")[2]:
            kind = kind or {"VScaling": "v_prediction", "EpsScaling": "epsilon"}.get(scaling)
            if kind is None:
                raise RequestError("model", beside, f"scales by {scaling}; allowed: EpsScaling, VScaling")
        discretization = denoiser.get("discretization_config", {}).get("params", {})
        zero = any(bool(part.get(option)) for part in (model, discretization) for option in _ZERO_SNR_OPTIONS)
    except RequestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        what = f"beside the checkpoint is no configuration of a model: {type(problem).__name__}"
        raise RequestError("model", beside, what) from None
    return Prediction(kind, zero)
