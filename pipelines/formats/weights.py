"""Files of weights: read whole or refused, put into modules strictly, and compared after writing."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from erase_concept.errors import EraseError, RequestError, out_of_memory

_ALIGNMENT = 64  # bytes; PyTorch's own on CPUs


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and its metadata; a ``.ckpt`` is unpickled for tensors alone, no code in it is run.

    Raises RequestError when it is damaged or holds anything but tensors.
    """
    if file.stat().st_size == 0:
        raise RequestError("model", file, "is an empty file")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys()}, dict(stored.metadata() or {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pickle's age
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:  # unpickling may raise anything for a file that is no pickle
        if out_of_memory(problem):
            raise
        if code := re.search(r"GLOBAL (\S+)", str(problem)):
            what = f"asks for {code[1]}, which is no tensor; code in a file is not run, and a .safetensors has none"
        elif isinstance(problem, pickle.UnpicklingError):  # its text is advice on how to run the code after all
            what = "is damaged or no file of weights: it must be a pickle of tensors alone"
        else:
            first = re.split(r"\. |\n", str(problem).strip() or type(problem).__name__)[0]
            what = f"is damaged or no file of weights: {first}"
        raise RequestError("model", file, what) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}, {}


def read_json(file: Path) -> dict[str, Any]:
    """Read a configuration; raises RequestError when it is damaged."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise RequestError("model", file, f"is damaged: {problem}") from None
    if not isinstance(found, dict):
        raise RequestError("model", file, "is damaged: it holds no mapping")
    return found


def published_name(module: nn.Module, name: str) -> str:
    """Return the name under which published models store a weight of a module.

    transformers 5 names those of CLIP's text encoder without ``text_model.``, transformers 4 and all files with it.
    """
    if not isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
        return name
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def assign_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module that was made on the meta device exactly these weights; raises RuntimeError when others are due."""
    module.load_state_dict(tensors, assign=True)
    for name, buffer in list(module.named_buffers()):
        owner, _, own = name.rpartition(".")
        if buffer.is_meta:  # the numbers of the positions, the only ones that no file holds
            if own != "position_ids":
                raise RuntimeError(f"{name} is in no file, and it is not known how to make it")
            places = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(own, places, persistent=False)


def align_weights(module: nn.Module) -> None:
    """Copy weights that lie in their file's memory, at any place in it, to where PyTorch puts its own tensors.

    A sum over numbers that begin elsewhere may be taken in another order: the length of a file's header would change
    the last bits of what the model gives.
    """
    for weight in module.parameters():
        if weight.data_ptr() % _ALIGNMENT:
            weight.data = weight.data.clone()


def check_same(written: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path) -> None:
    """Compare tensors with those that were read back, bit for bit; raises EraseError naming the first that differs."""
    for name in (*written, *found):
        value, other = written.get(name), found.get(name)
        if value is None or other is None or not torch.equal(_bits(value.to("cpu", other.dtype)), _bits(other)):
            raise EraseError(f"{where}: {name} was not written as it is; what was written is removed")


def dtype_names(tensors: Iterable[Tensor]) -> str:
    """Return the dtype of weights in words, such as "float16"; where they are mixed, all of them."""
    names = {str(value.dtype).removeprefix("torch.") for value in tensors if value.is_floating_point()}
    return ", ".join(sorted(names))


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)
