"""Sampled latents, kept across runs and methods: sampling is the longest part of a run.

They lie in ``$ERASE_CONCEPT_CACHE``, by default ``erase-concept`` in the user's cache folder, a file for each batch. A
run that was killed while it sampled finds there what it has, and so do other methods that learn from the same pictures.
The folder may be deleted at any time. Where the variable is empty, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase_concept.errors import EraseError, RequestError
from erase_concept.files import atomic_write
from erase_concept.pipelines.formats.scheduler import stated
from erase_concept.pipelines.formats.tensors import save_tensors
from erase_concept.pipelines.model import Diffusion
from erase_concept.run_folder import versions

VARIABLE = "ERASE_CONCEPT_CACHE"


def cache_folder() -> Path | None:
    """Return the folder in which latents are kept; None where they are not. Raises RequestError for no such home."""
    chosen = os.environ.get(VARIABLE)
    if chosen is None:
        chosen = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "erase-concept")
    try:
        return Path(chosen).expanduser() / "latents" if chosen else None
    except RuntimeError:
        allowed = 'is in no home folder of this machine; a folder is needed, or "" to keep no latents'
        raise RequestError(VARIABLE, chosen, allowed) from None


@dataclass(frozen=True)
class LatentsCache:
    """A folder of latents of a model whose UNet has weights of this hash."""

    folder: Path
    unet: str

    def find_or_make(self, model: Diffusion, asked: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """Return the latents [n, c, h, w] that follow from ``asked``, tensors included; make and keep them if new."""
        file = self.folder / f"{self._key(model, asked)}.safetensors"
        if (found := _read(file)) is not None:
            return found
        made = make()
        try:
            with atomic_write(file, sync=False) as partial:
                save_tensors({"latents": made.contiguous()}, partial, {"sha256": _sha256(made)})
        except (OSError, EraseError) as problem:
            warnings.warn(f"sampled latents could not be kept in {self.folder}: {problem}", stacklevel=2)
        return made

    def _key(self, model: Diffusion, asked: Mapping[str, Any]) -> str:
        """Return the SHA-256 over what is asked, and the model, its dtype, device and the libraries' versions."""
        unet = {name: value for name, value in model.unet.config.items() if name[0] != "_"}
        configs = [unet, stated(model.scheduler), dict(model.settings)]
        about = [self.unet, str(model.unet.dtype), model.device.type, configs, versions()]
        plain = {name: _sha256(value) if isinstance(value, Tensor) else value for name, value in asked.items()}
        return hashlib.sha256(json.dumps([about, plain], sort_keys=True, default=str).encode()).hexdigest()


def _read(file: Path) -> Tensor | None:
    """Return the latents of a file; None where there are none, or they are not what was written."""
    try:
        with safe_open(file, "pt") as stored:
            latents: Tensor = stored.get_tensor("latents")
            wanted = (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return latents.clone() if _sha256(latents) == wanted else None


def _sha256(tensor: Tensor) -> str:
    """Return the SHA-256 over a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
