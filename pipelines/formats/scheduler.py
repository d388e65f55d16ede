"""A scheduler's configuration as it was stated, which decides how other schedulers sample the same model."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.weights import read_json

FILE = "scheduler_config.json"
ZERO_SNR = "rescale_betas_zero_snr"  # the option by which a scheduler has zero terminal SNR (arXiv 2305.08891)


def stated(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's configuration without the values that nobody stated, which are its class's defaults.

    A scheduler of another class that is made from it takes its own defaults for these: DPM-Solver++ spaces its time
    steps "linspace" where Stable Diffusion's published PNDM says nothing, and "leading" where that is written down.
    The prediction type is always there: other programs ask for it, and all classes assume the same.
    """
    config = dict(scheduler.config)
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(scheduler)).parameters.items()}
    assumed = {name for name in config.get("_use_default_values") or () if config.get(name) == defaults.get(name)}
    assumed -= {"prediction_type"}
    return {"_class_name": type(scheduler).__name__} | {
        name: value for name, value in config.items() if name[0] != "_" and name not in assumed
    }


def write_stated(scheduler: Any, folder: Path) -> None:
    """Leave in a saved scheduler's file what was stated: diffusers writes down the defaults of its class, too."""
    file = folder / FILE
    kept = {"_diffusers_version", *stated(scheduler)}
    written = read_json(file)
    with atomic_write(file) as partial:
        partial.write_text(
            json.dumps({name: written[name] for name in sorted(kept & written.keys())}, indent=2) + "\n",
            encoding="utf-8",
        )


def knows_zero_snr(kind: type) -> bool:
    """Tell whether a class of schedulers can have zero terminal SNR; PNDM and others keep the option and do nothing."""
    return ZERO_SNR in inspect.signature(kind).parameters


def with_zero_snr(scheduler: Any) -> Any:
    """Return the scheduler, or DDIM's where its configuration asks for zero terminal SNR and its class has none."""
    if not scheduler.config.get(ZERO_SNR) or knows_zero_snr(type(scheduler)):
        return scheduler
    return DDIMScheduler.from_config(scheduler.config)
