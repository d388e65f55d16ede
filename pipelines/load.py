"""Loading a model by built-in name, diffusers folder, single file, run folder or hub id: whole, or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from erase_concept.errors import RequestError
from erase_concept.pipelines import emojinette
from erase_concept.pipelines.diffusion import Diffusion
from erase_concept.pipelines.from_single_file import SUFFIXES, load_parts

# What the VAE's attention was called when Stable Diffusion 1.x was published; diffusers renames it while loading.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
_PARTS_OF_XL = ("tokenizer_2", "text_encoder_2")
_KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
BUILTIN: dict[str, Path] = {"emojinette": emojinette.MODEL}


def load(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> Diffusion:
    """Load a Stable Diffusion 1.x, 2.x or XL model for erasing or sampling, its weights converted to ``dtype``.

    ``device`` is by default the one that Accelerate picks: the machine's accelerator where there is one.

    Raises RequestError when there is no such model, a file of it is damaged, or its weights do not fit its
    configuration: a model that loads only in part is not a model.
    """
    path = BUILTIN.get(str(model), Path(model))
    if (path / "run.json").is_file():
        path /= "pipeline"
    try:
        with quiet():
            parts = load_parts(path) if path.is_file() else _load_pipeline(path, str(model))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError) as problem:
        if isinstance(problem, RequestError):
            raise
        raise RequestError("MODEL", model, f"could not be loaded: {_first_line(problem)}") from problem
    device = device or PartialState().device
    with quiet():
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.to(device, dtype).eval().requires_grad_(False)
    return Diffusion(**parts, source=str(model))


def _load_pipeline(path: Path, name: str) -> dict[str, Any]:
    """Return the parts of a folder's model, or of a hub id's, which is downloaded into the hub's cache."""
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if not path.is_dir():
        if name.count("/") != 1 or name.startswith(("/", ".")) or path.parent.is_dir():
            allowed = f"a diffusers folder, a {' or '.join(SUFFIXES)} file, a run folder, a hub id (owner/name), or "
            allowed += ", ".join(BUILTIN)
            raise RequestError("MODEL", name, f"no such model; allowed: {allowed}")
        path = Path(DiffusionPipeline.download(name, **options))
    kind = _check_folder(path, name)
    options = options if kind == "StableDiffusionPipeline" else {"add_watermarker": False}
    options["variant"] = _variant(path / "unet")
    pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True, **options)
    xl = kind == "StableDiffusionXLPipeline"
    names = [*_PARTS, *(_PARTS_OF_XL if xl else ())]
    parts: dict[str, Any] = {part: getattr(pipeline, part, None) for part in names}
    missing = [part for part, value in parts.items() if value is None]
    if missing:
        raise RequestError("MODEL", name, f"has no {', '.join(missing)}: a whole Stable Diffusion model is needed")
    return parts | {"zeros_for_empty": xl and bool(pipeline.config.force_zeros_for_empty_prompt)}


def _variant(folder: Path) -> str | None:
    """Return the middle of ``diffusion_pytorch_model.fp16.safetensors`` where no file is without one."""
    found = (
        re.match(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", f.name)
        for f in folder.iterdir()
    )
    variants = {match[1] for match in found if match}
    return None if None in variants or not variants else min(variants)


def _check_folder(path: Path, name: str) -> str:
    """Return the kind of pipeline in a folder; refuse one without, and weights that its configurations do not fit."""
    if not (path / "model_index.json").is_file():
        raise RequestError("MODEL", name, "the folder holds no model_index.json: it is not a diffusers pipeline")
    kind = json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    if kind not in _KINDS:
        raise RequestError("MODEL", name, f"is a {kind}; needed: {' or '.join(_KINDS)}")
    for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if kind == _KINDS[1] else ())):
        files = sorted((path / part).glob("*.safetensors"))
        if not files and not list((path / part).glob("*.bin")):
            raise RequestError("MODEL", name, f"no weights in {part}/")
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
            except (SafetensorError, OSError) as problem:
                raise RequestError("MODEL", name, f"{part}/{file.name} is damaged: {_first_line(problem)}") from None
        if files:
            _check_shapes(path / part, part, name, shapes)
    return str(kind)


def _check_shapes(folder: Path, part: str, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the stored tensors with those the configuration asks for, without allocating any."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        module: nn.Module
        if part.startswith("text_encoder"):
            kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            module = kind(CLIPTextConfig.from_dict(config))
        else:
            module = (AutoencoderKL if part == "vae" else UNet2DConditionModel).from_config(config)
    for old, new in _RENAMED.items():
        shapes = {key.replace(old, new) if "attentions" in key else key: shape for key, shape in shapes.items()}
    for key, value in module.state_dict().items():
        # transformers 5 dropped the prefix "text_model." from the names; files of either kind load.
        stored = shapes.get(key) or shapes.get(f"text_model.{key}") or shapes.get(key.removeprefix("text_model."))
        if stored is None and key.endswith("position_ids"):
            continue
        if stored != tuple(value.shape):
            has = "is missing" if stored is None else f"has shape {list(stored)}"
            raise RequestError("MODEL", name, f"{part}: {key} {has}, its configuration asks for {list(value.shape)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and hints of diffusers and transformers, which say nothing a user needs."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, shown) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if shown:
                library.enable_progress_bar()


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
