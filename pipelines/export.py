"""Handing models back: a diffusers folder, the UNet alone, or everything in one file as A1111 and ComfyUI load it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from erase_concept.errors import EraseError
from erase_concept.files import whole
from erase_concept.pipelines.diffusion import Diffusion
from erase_concept.pipelines.from_single_file import read
from erase_concept.pipelines.load import quiet
from erase_concept.pipelines.single_file import from_original, replace_unet, save_single_file


def save_pipeline(model: Diffusion, folder: Path) -> None:
    """Write the model as a diffusers folder in its present dtype, replacing a folder of that name as a whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet():
            model.pipeline().save_pretrained(partial)
    except SafetensorError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise EraseError(f"{folder} could not be written: {problem}") from None
    # transformers 5 saves tokenizer.json alone; older versions need these two.
    for part, tokenizer in (("tokenizer", model.tokenizer), ("tokenizer_2", model.tokenizer_2)):
        source = Path(str(getattr(tokenizer, "name_or_path", "")))
        for name in getattr(tokenizer, "vocab_files_names", {}).values():
            for file in (source / name, source / part / name):
                if file.is_file() and not (partial / part / name).exists():
                    shutil.copyfile(file, partial / part / name)
    for weights in partial.rglob("*.safetensors"):
        weights.chmod((partial / "model_index.json").stat().st_mode)  # safetensors writes for the owner alone
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def save_unet(unet: nn.Module, file: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write the UNet's weights under diffusers' names as one safetensors file."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in unet.state_dict().items()}
    with whole(file) as partial:
        save_file(tensors, partial, {"format": "pt", **metadata})


def save_original(model: Diffusion, file: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write the model as one safetensors file in the original layout, and read it back.

    A model that came from such a file gets its UNet put into a copy of it, in the types that are there; all that is not
    the UNet stays as it was, bit for bit. Any other model is written in ``dtype``. Raises EraseError, and leaves no
    file, when what is read back is not what was written.
    """
    source = Path(model.source)
    if source.is_file() and source.suffix == ".safetensors":
        replace_unet(source, model.unet.state_dict(), file, metadata)
    else:
        parts = {part: {name: v.to(dtype) for name, v in state.items()} for part, state in model.states().items()}
        save_single_file(parts, model.family, file, metadata)
    states = model.states()
    for part, state in from_original(read(file)[0], states, model.family).items():
        for name, value in state.items():
            if not torch.equal(value, states[part][name].to("cpu", value.dtype)):
                file.unlink()
                raise EraseError(f"{part}: {name} was not written as it is; {file} is removed")
