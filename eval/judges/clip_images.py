"""What the judges with a CLIP image encoder share: how it is loaded, and how images are read and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from erase_concept.errors import EraseError, RequestError, first_line
from erase_concept.eval.features import read_image
from erase_concept.eval.judges.classifier import shown_name, why_not

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

UNSAFE = ("inappropriate",)
_AT_ONCE = 16  # images in a batch


@dataclass(frozen=True, eq=False)
class ClipPart:
    """A network with a CLIP image encoder, its preprocessing, and the SHA-256 of its weights."""

    name: str
    network: Any
    preprocess: Any
    weights: str
    device: torch.device


def load_clip_part(judge: str, model: str, kind: Any) -> ClipPart:
    """Load a network of a class of transformers or diffusers, with its preprocessing, by hub id or from a folder.

    A pipeline has the preprocessing in a folder of its own beside it; without any it is CLIP's. Raises RequestError
    that names the judge when something is missing.
    """
    import torch
    from huggingface_hub import constants
    from transformers import CLIPImageProcessor

    from erase_concept.pipelines.hub import silence_hub_logs
    from erase_concept.pipelines.model import weights_hash
    from erase_concept.pipelines.processes import processes

    setting, folder = f"judge.{judge}.model", Path(model)
    if not folder.is_dir() and (model.count("/") > 1 or model.startswith(("/", ".", "~"))):
        raise RequestError(setting, model, "there is no such folder")
    options = {"local_files_only": folder.is_dir() or constants.HF_HUB_OFFLINE}
    try:
        with silence_hub_logs():
            network, loaded = kind.from_pretrained(model, output_loading_info=True, **options)
            where = [one for one in (folder, folder.parent / "feature_extractor") if _has_preprocessing(one)]
            if folder.is_dir() and not where:
                preprocess = CLIPImageProcessor()
            else:
                preprocess = CLIPImageProcessor.from_pretrained(where[0] if where else model, **options)
    except Exception as problem:  # of every kind: the configuration's, the file's, the HTTP library's
        raise RequestError(setting, model, why_not(problem)) from problem
    # transformers makes up at random what is missing, but for the numbers of the positions.
    if missing := sorted(name for name in loaded["missing_keys"] if not name.endswith("position_ids")):
        raise RequestError(setting, model, f"has no weights for {missing[0]}")
    device = processes().device
    network = network.to(device, torch.float32).eval().requires_grad_(False)
    return ClipPart(shown_name(model), network, preprocess, weights_hash(network), device)


def scores_of_images(files: Sequence[Path], part: ClipPart, score: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
    """Return a score [n] of each image; NaN of one that cannot be read, or of which the network makes no number.

    ``score`` gets preprocessed images [m, 3, height, width]. Raises EraseError when the network fails.
    """
    import torch

    found = np.full(len(files), np.nan, np.float32)
    for start in range(0, len(files), _AT_ONCE):
        batch = {}
        for place, file in enumerate(files[start : start + _AT_ONCE], start):
            try:
                image = Image.fromarray(read_image(file))
            except RequestError:
                continue
            batch[place] = part.preprocess(images=image, return_tensors="pt")["pixel_values"][0]
        if not batch:
            continue
        try:
            with torch.inference_mode():
                scored = score(torch.stack(list(batch.values())).to(part.device))
        except RuntimeError as problem:  # such as too little memory
            raise EraseError(f"{part.name} failed: {first_line(problem)}") from problem
        found[list(batch)] = scored.float().cpu().numpy()
    return found


def _has_preprocessing(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").is_file()
