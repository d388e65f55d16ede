"""Files of weights: read whole or refused, put into modules strictly, and compared after writing."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from erase_concept import files
from erase_concept.errors import EraseError, RequestError, first_line, out_of_memory
from erase_concept.files import mistaken_for, regular_size
from erase_concept.pipelines.formats.pickles import check_plain_tensors, unpickle
from erase_concept.pipelines.formats.quantized import METADATA, dequantized
from erase_concept.pipelines.formats.tensors import open_tensors

_ALIGNMENT = 64  # bytes; PyTorch's own on CPUs
_DEEPEST = 16  # mappings around the weights
_MAPPED = 512 << 20  # bytes of tensors that are mapped together


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and its metadata; a ``.ckpt`` is unpickled for tensors alone, no code in it is run.

    Scaled fp8 weights come back times their scales. Raises RequestError when the file is damaged, is something else
    than its name says, or has weights that are quantised in another way.
    """
    _check_content(file)
    metadata: dict[str, str] = {}
    try:
        if is_safetensors(file):
            with open_tensors(file) as stored:
                metadata = dict(stored.metadata() or {})
            tensors = dict(each_tensor(file))
        else:
            tensors = _state_dict(unpickle(file))
            check_plain_tensors(tensors, file.stat().st_size)
    except Exception as problem:  # unpickling may raise anything for a file that is no pickle
        if out_of_memory(problem):
            raise EraseError(f"{file}: there is too little memory to load it") from problem
        if code := re.search(r"GLOBAL (\S+)", str(problem)):
            what = f"asks for {code[1]}, which is no tensor; code in a file is not run, and a .safetensors has none"
        elif isinstance(problem, pickle.UnpicklingError):  # its text is advice on how to run the code after all
            what = "is damaged or no file of weights: it must be a pickle of tensors alone"
        else:
            first = re.split(r"\. |\n", str(problem).strip() or type(problem).__name__)[0]
            what = f"is damaged or no file of weights: {first}"
        raise RequestError("model", file, what) from None
    try:
        plain = dequantized(tensors, metadata, file)
    except RuntimeError as problem:
        if out_of_memory(problem):
            raise EraseError(f"{file}: there is too little memory to load it") from problem
        raise RequestError("model", file, f"its scales do not fit its weights: {first_line(problem)}") from None
    metadata.pop(METADATA, None)  # what is returned is no longer quantised
    return plain, metadata


def each_tensor(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a safetensors file's tensors by name, mapped to the file.

    The file is opened again for every so many bytes of tensors, so that they are mapped apart: each part of it takes no
    more memory as soon as its tensors have been converted.
    """
    with safe_open(file, "pt") as stored:
        left = list(stored.keys())[::-1]
    while left:
        size = 0
        with safe_open(file, "pt") as stored:
            while left and size < _MAPPED:
                key = left.pop()
                tensor = stored.get_tensor(key)
                size += tensor.nbytes
                yield key, tensor


def is_safetensors(file: Path) -> bool:
    """Tell whether a file's name is that of a safetensors file, in small or capital letters."""
    return file.suffix.lower() == ".safetensors"


def _check_content(file: Path) -> None:
    """Raise RequestError for a file that its first bytes show to be something else than its name says."""
    try:
        size = regular_size(file)
        with file.open("rb") as stream:
            head = stream.read(64)
    except (OSError, ValueError) as problem:
        raise RequestError("model", file, f"cannot be read: {problem}") from None
    if not head:
        raise RequestError("model", file, "is an empty file")
    no_weights = "is damaged or no file of weights: "
    # A safetensors file begins with the length of its header, which may be the same bytes.
    pickled = head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")) and head[8:9] != b"{"
    if head.startswith(b"GGUF"):
        what = "is a GGUF file, whose weights are quantised; a checkpoint in fp32, fp16, bf16 or fp8 is needed"
    elif mistaken := mistaken_for(file):
        what = f"{no_weights}it {mistaken}"
    elif is_safetensors(file) and pickled:
        what = f"{no_weights}it is a pickle under the name of a .safetensors; rename it to .ckpt"
    elif not is_safetensors(file) and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        what = f"{no_weights}it is a safetensors file under the name of a {file.suffix}; rename it to .safetensors"
    else:
        return
    raise RequestError("model", file, what)


def _state_dict(content: object) -> dict[str, Tensor]:
    """Return the tensors of what was unpickled, which trainers nest as ``state_dict``, ``model`` or ``module``."""
    for _ in range(_DEEPEST):  # a mapping may hold itself
        if not isinstance(content, dict):
            return {}
        bare = not any(isinstance(value, Tensor) for value in content.values())
        names = ("state_dict", *(("model", "module") if bare else ()))
        nested = [content[name] for name in names if isinstance(content.get(name), dict)]
        if not nested:
            return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        content = nested[0]
    raise ValueError("its weights are nested too deeply")


def read_json(file: Path) -> dict[str, Any]:
    """Read a configuration; raises RequestError when it is damaged."""
    try:
        found: dict[str, Any] = files.read_json(file)
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


def check_finite(module: nn.Module, part: str, name: str) -> None:
    """Raise RequestError naming the first weight of a model's part that holds NaN or infinity."""
    for key, value in module.state_dict().items():
        if not value.is_floating_point() or not value.numel():
            continue
        least, most = (value.float() if value.itemsize == 1 else value).aminmax()  # NaN where there is any
        if not (least.isfinite() and most.isfinite()):
            what = f"{part}: {published_name(module, key)} holds NaN or infinity: the model is broken"
            raise RequestError("model", name, what)


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


def read_dtypes(file: Path) -> str:
    """Return the dtypes of a safetensors file's weights in words, as ``dtype_names`` does, without reading them."""
    with safe_open(file, "pt") as stored:
        sizes = {key: stored.get_slice(key) for key in stored.keys()}
        kinds = {(one.get_dtype(), key) for key, one in sizes.items() if 0 not in one.get_shape()}
    words = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    words |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    found = {words[kind] for kind, key in kinds if kind in words and not key.endswith(".alpha")}
    return ", ".join(sorted(found))


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)
