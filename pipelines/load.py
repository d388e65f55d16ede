"""Loading a model: by built-in name, diffusers folder, single file, run folder, hub id, or from a loaded pipeline."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erase_concept.errors import EraseError, RequestError, first_line, out_of_memory
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.families.family import Configs, Family
from erase_concept.pipelines.formats.folder import (
    component_weights,
    folder_beside_weights,
    load_folder,
    read_configs,
    read_family,
)
from erase_concept.pipelines.formats.single_file import (
    SUFFIXES,
    load_single_file,
    original_weights,
    single_file_beside_weights,
    single_file_configs,
)
from erase_concept.pipelines.formats.weights import align_weights, check_finite
from erase_concept.pipelines.hub import download, silence_hub_logs
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.processes import processes


def load(
    model: str | Path | DiffusionPipeline,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    ema: bool | None = None,
    keep_unet: bool = False,
) -> Diffusion:
    """Load a model of a known family for erasing or sampling, its weights converted to ``dtype``.

    ``device`` is by default the one that Accelerate picks: the machine's accelerator where there is one. Where a single
    file has the UNet's weights twice, ``ema`` takes their averages over the training or the live ones; without it the
    averages are taken where both are nearly alike. Which were taken is logged. For any other model it changes nothing.
    A loaded pipeline is copied, so that it stays as it is. With ``keep_unet`` the UNet stays in main memory as it is
    stored, for whoever converts it: the largest part is then never there in another dtype.

    Raises RequestError when there is no such model, a file of it is damaged, its weights do not fit its configuration
    or are not finite, or its components do not fit each other: a model loads whole or not at all. Raises EraseError
    when there is too little memory for it.
    """
    name = type(model).__name__ if isinstance(model, DiffusionPipeline) else str(model)
    with _loading(name):
        loaded = _load(model, ema=ema)
        for part, module in loaded.modules.items():
            module.eval().requires_grad_(False)
            if part != "unet" or not keep_unet:
                align_weights(module.to(device or processes().device, dtype))
            check_finite(module, part, name)
    if loaded.taken and processes().is_main_process:
        _say(f"erase-concept: {name}: {loaded.taken}")
    return loaded


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn whatever is raised while a model is read into a RequestError or an EraseError of one line."""
    try:
        with silence_hub_logs():
            yield
    except RequestError:
        raise
    except Exception as problem:  # a damaged file leads the libraries to errors of any class
        if out_of_memory(problem):
            raise EraseError(f"{name}: there is too little memory to load it") from problem
        if isinstance(problem, EraseError):
            raise
        raise RequestError("model", name, f"could not be loaded: {first_line(problem)}") from problem


@cache
def _say(text: str) -> None:
    """Log a line, once in a process; without any other setting of Python's logging it goes to stderr."""
    logging.getLogger("erase_concept").warning(text)


@dataclass(frozen=True)
class ModelConfigs:
    """What is known of a model without its weights: its family, and its components' configurations by name."""

    family: Family
    components: Configs


def configs(model: str | Path, *, ema: bool | None = None) -> ModelConfigs:
    """Return a model's family and configurations; a folder's without reading any weights.

    ``ema`` is as for ``load``. Raises RequestError when there is no such model, it is on the hub and cannot be
    downloaded, or it is a single file that ``load`` would refuse for its UNets.
    """
    with _loading(str(model)):
        path = locate(model)
        if path.is_file():
            return ModelConfigs(*single_file_configs(path, str(model), ema=ema))
        family = read_family(path, str(model))
        return ModelConfigs(family, read_configs(path, family))


def locate(model: str | Path) -> Path:
    """Return the folder or the file of a model; one on the hub is downloaded. Raises RequestError as ``load`` does."""
    path = _path(model)
    return path if path.is_file() else _folder(path, str(model))


def stored_weights(model: str | Path, part: str, *, ema: bool | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield a component's weights as they are stored, one at a time, by their published names in order.

    At no time is more than a part of the component in memory. ``ema`` is as for ``load``, and so are the errors.
    """
    path, name = locate(model), str(model)
    if path.is_file():
        return original_weights(path, name, part, ema=ema)
    return component_weights(path / part, read_family(path, name), name)


def beside_weights(model: str | Path, *, ema: bool | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a model's scheduler and tokenizers by diffusers' names, and its pipeline's settings, without its weights.

    ``ema`` is as for ``load``, and so are the errors.
    """
    with _loading(str(model)):
        path = locate(model)
        if path.is_file():
            return single_file_beside_weights(path, str(model), ema=ema)
        return folder_beside_weights(path, str(model))


def _load(model: str | Path | DiffusionPipeline, *, ema: bool | None) -> Diffusion:
    """Load a model in the dtypes that it has."""
    if isinstance(model, DiffusionPipeline):
        shared = Diffusion.from_pipeline(model)
        return shared.with_components(**{name: copy.deepcopy(module) for name, module in shared.modules.items()})
    path = locate(model)
    if path.is_file():
        return load_single_file(path, str(model), ema=ema)
    return load_folder(path, str(model))


def _path(model: str | Path) -> Path:
    builtin = builtin_models().get(str(model))
    path = builtin.folder if builtin else Path(model)
    return path / "pipeline" if (path / "run.json").is_file() else path


def _folder(path: Path, name: str) -> Path:
    """Return the folder of a model, or of a hub id's, which is downloaded into the hub's cache."""
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith(("/", ".")) or path.parent.is_dir():
        allowed = f"a diffusers folder, a {' or '.join(SUFFIXES)} file, a run folder, a hub id (owner/name), or "
        allowed += ", ".join(builtin_models())
        raise RequestError("model", name, f"no such model; allowed: {allowed}")
    return download(name)
