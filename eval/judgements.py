"""What judges said of an evaluation's images, kept beside the report, so that its numbers can be counted again.

``judgements.safetensors`` holds the exact numbers of every judge and model, with the SHA-256 of each image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from erase_concept.errors import RequestError
from erase_concept.eval.judges.judge import Detection, Judgement
from erase_concept.eval.metrics.metric import JudgedImages
from erase_concept.files import atomic_write, file_sha256

if TYPE_CHECKING:
    from erase_concept.pipelines.image_set import ImageSet

JUDGEMENTS = "judgements.safetensors"
_FORMAT = "erase-concept judgements 1"
_ABOUT = "about"  # JSON in UTF-8, as a tensor: the header of a safetensors file may be too short for it


@dataclass(frozen=True, eq=False)
class Judged:
    """The images of the erased model and of the base model, if there is one, and what the judges say of them."""

    erased: JudgedImages
    base: JudgedImages | None

    @property
    def sides(self) -> dict[str, JudgedImages]:
        """Both by name."""
        return {"erased": self.erased} | ({} if self.base is None else {"base": self.base})


def save_judgements(judged: Judged, folder: Path) -> Path:
    """Write the judgements into a report's folder, and return the file."""
    tensors: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    for who, side in judged.sides.items():
        judges = {}
        for name, one in side.judgements.items():
            arrays = {"scores": one.scores, "features": one.features, "flagged": one.flagged}
            tensors |= {
                f"{who}/{name}/{key}": np.ascontiguousarray(value) for key, value in arrays.items() if value is not None
            }
            judges[name] = {
                "labels": one.labels,
                "kinds": one.kinds,
                "threshold": one.threshold,
                "words": one.words,
                "detections": one.detections and [_plain(found) for found in one.detections],
            }
        about[who] = {"images": [file_sha256(file) for file in side.images.files], "judges": judges}
    text = json.dumps(about, ensure_ascii=True).encode()
    tensors[_ABOUT] = np.frombuffer(text, np.uint8)
    file = folder / JUDGEMENTS
    with atomic_write(file) as partial:
        save_file(tensors, partial, {"format": _FORMAT})
    return file


def read_judgements(folder: Path, images: Mapping[str, ImageSet]) -> Judged:
    """Read what the judges said of these images, of the erased model and of the base model, if there is one.

    Raises RequestError when the file is missing or damaged, or is of other images.
    """
    file = folder / JUDGEMENTS
    try:
        with safe_open(file, "np") as stored:
            if (stored.metadata() or {}).get("format") != _FORMAT:
                raise ValueError("it is of another format")
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        about = json.loads(tensors.pop(_ABOUT).tobytes())
        sides = {who: _judged(who, about[who], tensors, images[who]) for who in images}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        if isinstance(problem, RequestError):
            raise
        raise RequestError("judgements", file, f"is missing or damaged: {problem}; evaluate again") from None
    if about.keys() != images.keys():
        raise RequestError("judgements", file, f"is of {' and '.join(about)}, the images of {' and '.join(images)}")
    return Judged(sides["erased"], sides.get("base"))


def _judged(who: str, about: Mapping[str, Any], tensors: Mapping[str, np.ndarray], images: ImageSet) -> JudgedImages:
    if about["images"] != [file_sha256(file) for file in images.files]:
        raise RequestError("judgements", JUDGEMENTS, f"is of other images than those of the {who} model")
    found = {}
    for name, one in about["judges"].items():
        flagged = tensors.get(f"{who}/{name}/flagged")
        found[name] = Judgement(
            tuple(one["labels"]),
            tensors[f"{who}/{name}/scores"],
            tuple(one["kinds"]),
            one["threshold"],
            tuple(one["words"]),
            None if flagged is None else flagged.astype(bool),
            tensors.get(f"{who}/{name}/features"),
            one["detections"] and tuple(_detections(found) for found in one["detections"]),
        )
    return JudgedImages(images, found)


def _plain(found: tuple[Detection, ...] | None) -> list[list[Any]] | None:
    return None if found is None else [[one.label, one.score] for one in found]


def _detections(found: list[list[Any]] | None) -> tuple[Detection, ...] | None:
    return None if found is None else tuple(Detection(label, score) for label, score in found)
