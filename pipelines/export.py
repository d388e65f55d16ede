"""Handing models back: a diffusers folder, or the UNet alone as safetensors."""

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
from erase_concept.pipelines.load import quiet


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
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def save_unet(unet: nn.Module, file: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write the UNet's weights under diffusers' names as one safetensors file."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in unet.state_dict().items()}
    with whole(file) as partial:
        save_file(tensors, partial, {"format": "pt", **metadata})
