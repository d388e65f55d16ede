"""Handing models back: a diffusers folder, the UNet alone, or everything in one file as A1111 and ComfyUI load it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erase_concept.errors import EraseError
from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.single_file import from_original, replace_unet, save_single_file
from erase_concept.pipelines.load import read_weights, silence_hub_logs
from erase_concept.pipelines.model import Diffusion, published_name


def save_pipeline(model: Diffusion, folder: Path, card: str = "") -> None:
    """Write the model as a diffusers folder in its present dtype, and load it back; ``card`` becomes its README.md.

    The weights have the names of published models, whatever version of the libraries writes them.

    A folder of that name is replaced as a whole. Raises EraseError, and leaves that as it was, when a file cannot be
    written or when what loads is not what was written.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with silence_hub_logs():
            _save_parts(model, partial)
        # transformers 5 saves tokenizer.json alone; older versions need these two.
        for part, tokenizer in (("tokenizer", model.tokenizer), ("tokenizer_2", model.tokenizer_2)):
            source = Path(str(getattr(tokenizer, "name_or_path", "")))
            for name in getattr(tokenizer, "vocab_files_names", {}).values():
                for file in (source / name, source / part / name):
                    if file.is_file() and not (partial / part / name).exists():
                        shutil.copyfile(file, partial / part / name)
        for weights in partial.rglob("*.safetensors"):
            weights.chmod((partial / "model_index.json").stat().st_mode)  # safetensors writes for the owner alone
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for name, module in {"unet": model.unet, "vae": model.vae, **model.text_encoders}.items():
            with silence_hub_logs():  # one part at a time, so that the model is never in memory twice
                found = type(module).from_pretrained(partial / name, local_files_only=True).state_dict()
            check_same(module.state_dict(), found, folder / name)
            if read_weights(partial / name).keys() != {published_name(name, key) for key in found}:
                raise EraseError(f"{folder / name}: its weights were written under other names than published models'")
            del found  # where files in use cannot be renamed, a part that is read from its file would hold it
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except SafetensorError as problem:
        raise EraseError(f"{folder} could not be written: {problem}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_parts(model: Diffusion, folder: Path) -> None:
    """Write all that diffusers' own ``save_pretrained`` writes, but for the names of the text encoders' weights."""
    pipeline = model.pipeline()
    for name, part in pipeline.components.items():
        if name in model.text_encoders:
            state = {published_name(name, key): value for key, value in part.state_dict().items()}
            # transformers 5 would name them as the file did from which it loaded them.
            part.save_pretrained(folder / name, state_dict=state, save_original_format=False)
        elif part is not None:
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)


def save_unet(unet: nn.Module, file: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write the UNet's weights under diffusers' names as one safetensors file, and read it back.

    Raises EraseError, and leaves no file, when what is read back is not what was written.
    """
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in unet.state_dict().items()}
    with atomic_write(file) as partial:
        save_file(tensors, partial, {"format": "pt", **metadata})
        check_same(tensors, load_file(partial), file)


def check_same(written: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path) -> None:
    """Compare tensors with those that were read back, bit for bit; raises EraseError naming the first that differs."""
    for name in (*written, *found):
        value, other = written.get(name), found.get(name)
        if value is None or other is None or not torch.equal(_bits(value.to("cpu", other.dtype)), _bits(other)):
            raise EraseError(f"{where}: {name} was not written as it is; what was written is removed")


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
    try:
        for part, found in from_original(load_file(file), states, model.family).items():
            check_same(states[part], found, file)
    except (EraseError, SafetensorError, ValueError) as problem:
        file.unlink()
        raise EraseError(f"{file} could not be read back: {problem}") from None


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)
