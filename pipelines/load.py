"""Loading a model by built-in name, diffusers folder, single file, run folder or hub id: whole, or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from erase_concept.errors import EraseError, RequestError
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.formats.read_single_file import (
    MODEL_CLASSES,
    SUFFIXES,
    TOKENIZER_FILES,
    assign_weights,
    load_parts,
    out_of_memory,
    read,
    read_configs,
    read_json,
)
from erase_concept.pipelines.model import Diffusion, check_fit, dtype_names, published_name
from erase_concept.pipelines.processes import processes

# What the VAE's attention was called when Stable Diffusion 1.x was published; diffusers renames it while loading.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# What a pipeline is made of, and the file of each part's folder, or one of several, without which it is nothing.
_PARTS = {"tokenizer": TOKENIZER_FILES, "scheduler": ("scheduler_config.json",)}
_PARTS |= dict.fromkeys(("text_encoder", "vae", "unet"), ("config.json",))
_PARTS_OF_XL = {"tokenizer_2": TOKENIZER_FILES, "text_encoder_2": ("config.json",)}
_KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
_NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
_ALIGNMENT = 64  # bytes; PyTorch's own on CPUs


def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    ema: bool = True,
) -> Diffusion:
    """Load a Stable Diffusion 1.x, 2.x or XL model for erasing or sampling, its weights converted to ``dtype``.

    ``device`` is by default the one that Accelerate picks: the machine's accelerator where there is one. Where a single
    file has the UNet's weights twice, ``ema`` takes their averages over the training, and its opposite the live ones;
    any other model gives what is there with either choice.

    Raises RequestError when there is no such model, a file of it is damaged, its weights do not fit its configuration,
    or its parts do not fit each other: a model that loads only in part is not a model. Raises EraseError when there is
    too little memory for it.
    """
    path = _path(model)
    try:
        with silence_hub_logs():
            parts = load_parts(path, ema=ema) if path.is_file() else _load_pipeline(path, str(model))
            for part in parts.values():
                if isinstance(part, nn.Module):
                    _align_weights(part.to(device or processes().device, dtype).eval().requires_grad_(False))
    except RequestError:
        raise
    except (MemoryError, OSError, ValueError, LookupError, EOFError, RuntimeError, SafetensorError) as problem:
        if out_of_memory(problem):
            raise EraseError(f"{model}: there is too little memory to load it") from problem
        raise RequestError("MODEL", model, f"could not be loaded: {_first_line(problem)}") from problem
    return Diffusion(**parts, source=str(model))


def configs(model: str | Path) -> dict[str, Any]:
    """Return the configurations of a model's parts by diffusers' names, without loading any weights.

    Raises RequestError when there is no such model, or it is on the hub and not in its cache.
    """
    path = _path(model)
    if not path.is_file():
        path = _folder(path, str(model))
        _part_names(path, str(model))
    return read_configs(path)


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
        raise RequestError("MODEL", name, f"no such model; allowed: {allowed}")
    return _download(name)


def _load_pipeline(path: Path, name: str) -> dict[str, Any]:
    """Return the parts of a folder's model, or of a hub id's."""
    path = _folder(path, name)
    names = _part_names(path, name)
    xl = "text_encoder_2" in names
    modules = {part: _load_part(path / part, name) for part in names if part in MODEL_CLASSES}
    stored = dtype_names(modules["unet"].state_dict().values())
    options = {"add_watermarker": False} if xl else _NO_CHECKER
    pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True, **modules, **options)
    parts: dict[str, Any] = {part: getattr(pipeline, part) for part in names}
    check_fit(parts)
    return parts | {
        "stored": stored,
        "force_zeros_for_empty_prompt": xl and bool(pipeline.config.force_zeros_for_empty_prompt),
    }


def _download(name: str) -> Path:
    """Return the folder of a hub id's model in the hub's cache; raises RequestError that says what to do instead."""
    try:
        return Path(DiffusionPipeline.download(name, **_NO_CHECKER))
    except Exception as problem:  # among them those of the HTTP library, which is another one in each version
        cause = problem if isinstance(problem, HfHubHTTPError) else problem.__cause__ or problem
        closed = getattr(getattr(cause, "response", None), "status_code", None) in (401, 403)
        login = "log in with 'hf auth login' or set HF_TOKEN"
        if isinstance(cause, GatedRepoError):
            what = f"is gated: accept its terms at https://huggingface.co/{name}, and {login}"
        elif isinstance(cause, RepositoryNotFoundError) or closed:
            what = f"is not on the hub, or is closed to you there: {login}"
        elif isinstance(cause, OfflineModeIsEnabled):
            what = "is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
        else:
            what = f"is not in the hub's cache and could not be downloaded: {_first_line(cause)}"
        raise RequestError("MODEL", name, what) from problem


def _part_names(path: Path, name: str) -> list[str]:
    """Return what the pipeline in a folder is made of; refuse a folder without one, or one that lacks a part."""
    if not (path / "model_index.json").is_file():
        raise RequestError("MODEL", name, "the folder holds no model_index.json: it is not a diffusers pipeline")
    index = read_json(path / "model_index.json")
    kind = index.get("_class_name")
    if kind not in _KINDS:
        raise RequestError("MODEL", name, f"is a {kind}; needed: {' or '.join(_KINDS)}")
    parts = _PARTS | (_PARTS_OF_XL if kind == _KINDS[1] else {})
    for part, files in parts.items():
        if not any(index.get(part) or ()) or not any((path / part / file).is_file() for file in files):
            needed = f"{' or '.join(files)} in {part}/ and a line in model_index.json"
            raise RequestError("MODEL", name, f"has no {part}: a whole Stable Diffusion model needs {needed}")
    return list(parts)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a part's folder, under the names of its files; of several variants, those of the first.

    A variant is the middle of ``diffusion_pytorch_model.fp16.safetensors``; the one without a name comes first. Returns
    nothing when there are no weights; raises RequestError when a file is damaged.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(file.name):
            found.setdefault(match[1] or "", []).append(file)
    files = found[min(found)] if found else []
    files = [file for file in files if file.suffix == ".safetensors"] or files
    return {key: value for file in files for key, value in read(file)[0].items()}


def _load_part(folder: Path, name: str) -> nn.Module:
    """Return the UNet, the VAE or a text encoder of a folder, with the weights of its files, in their dtypes.

    Nothing is left to the libraries here: one that knows a weight by another name makes up random ones in its place.
    Raises RequestError naming the first weight that is missing, has another shape, or has no place.
    """
    with torch.device("meta"):
        module: nn.Module = MODEL_CLASSES[folder.name](read_json(folder / "config.json"))
    places = {published_name(folder.name, key): (key, list(value.shape)) for key, value in module.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for key, value in read_weights(folder).items():
        for old, new in _RENAMED.items():
            key = key.replace(old, new) if "attentions" in key else key  # noqa: PLW2901
        place = published_name(folder.name, key)
        if place in tensors:
            raise RequestError("MODEL", name, f"{folder.name}: {place} is in its files twice")
        if not key.endswith("position_ids"):  # the numbers 0, 1, 2 ..., which older files hold
            tensors[place] = value
    if not tensors:
        raise RequestError("MODEL", name, f"no weights in {folder.name}/")
    for key, (_, asked) in places.items():
        has = f"has shape {list(tensors[key].shape)}" if key in tensors else "is missing"
        if key not in tensors or list(tensors[key].shape) != asked:
            raise RequestError("MODEL", name, f"{folder.name}: {key} {has}, its configuration asks for {asked}")
    if extra := sorted(tensors.keys() - places.keys()):
        raise RequestError("MODEL", name, f"{folder.name}: {extra[0]} has no place in what its configuration describes")
    assign_weights(module, {key: tensors[place] for place, (key, _) in places.items()})
    return module


def _align_weights(module: nn.Module) -> None:
    """Copy the weights that lie in their file's memory, at any place in it, to where PyTorch puts its own tensors.

    A sum over numbers that begin elsewhere may be taken in another order: the length of a file's header would change
    the last bits of what the model gives.
    """
    for weight in module.parameters():
        if weight.data_ptr() % _ALIGNMENT:
            weight.data = weight.data.clone()


@contextmanager
def silence_hub_logs() -> Iterator[None]:
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
