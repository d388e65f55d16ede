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
from pydantic import TypeAdapter
from safetensors import SafetensorError
from typing_extensions import TypedDict

from erase_concept.errors import RequestError
from erase_concept.eval.judges.judge import Detection, Judgement
from erase_concept.eval.metrics.metric import JudgedImages
from erase_concept.files import atomic_write, file_sha256, parse_json
from erase_concept.pipelines.formats.tensors import open_tensors, save_tensors

if TYPE_CHECKING:
    from erase_concept.pipelines.image_set import ImageSet

JUDGEMENTS = "judgements.safetensors"
_FORMAT = "erase-concept judgements 1"
_ABOUT = "about"  # JSON in UTF-8, as a tensor: the header of a safetensors file may be too short for it
_MOST_VALUES = 10_000_000  # of that JSON: some twenty detections in each of 100,000 pairs of images


class _Told(TypedDict):
    """What the file says of a judgement beside its tensors."""

    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    threshold: float | None
    words: tuple[str, ...]
    detections: list[list[tuple[str, float]] | None] | None


_TOLD = TypeAdapter(_Told)


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
        save_tensors(tensors, partial, {"format": _FORMAT})
    return file


def read_judgements(folder: Path, images: Mapping[str, ImageSet]) -> Judged:
    """Read what the judges said of these images, of the erased model and of the base model, if there is one.

    Raises RequestError when the file is missing or damaged, or is of other images.
    """
    file = folder / JUDGEMENTS
    try:
        with open_tensors(file) as stored:
            if (stored.metadata() or {}).get("format") != _FORMAT:
                raise ValueError("it is of another format")
            tensors = {key: stored.get_tensor(key).numpy() for key in stored.keys()}
        about = parse_json(tensors.pop(_ABOUT).tobytes().decode(), most=_MOST_VALUES)
        sides = {who: _judged(who, about[who], tensors, images[who]) for who in images}
    except RequestError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as problem:
        raise RequestError("judgements", file, f"is missing or damaged: {problem}; evaluate again") from None
    if about.keys() != images.keys():
        raise RequestError("judgements", file, f"is of {' and '.join(about)}, the images of {' and '.join(images)}")
    return Judged(sides["erased"], sides.get("base"))


def _judged(who: str, about: Mapping[str, Any], tensors: Mapping[str, np.ndarray], images: ImageSet) -> JudgedImages:
    if about["images"] != [file_sha256(file) for file in images.files]:
        raise RequestError("judgements", JUDGEMENTS, f"is of other images than those of the {who} model")
    found = {}
    for name, one in about["judges"].items():
        told = _TOLD.validate_python(one)
        flagged = tensors.get(f"{who}/{name}/flagged")
        found[name] = Judgement(
            told["labels"],
            tensors[f"{who}/{name}/scores"],
            told["kinds"],
            told["threshold"],
            told["words"],
            None if flagged is None else flagged.astype(bool),
            tensors.get(f"{who}/{name}/features"),
            None if told["detections"] is None else tuple(map(_detections, told["detections"])),
        )
        _check_lengths(name, found[name], len(images.files))
    return JudgedImages(images, found)


def _check_lengths(name: str, found: Judgement, count: int) -> None:
    """Raise ValueError unless a judgement is of so many images, and its arrays are of numbers and of their shapes."""
    scores, features, flagged = found.scores, found.features, found.flagged
    of_each = [
        len(one) for one in (scores, features, flagged, found.detections, found.words or None) if one is not None
    ]
    if set(of_each) != {count} or len(found.kinds) not in (0, len(found.labels)):
        raise ValueError(f"{name} is not of {count:,} images")
    if scores.dtype.kind != "f" or (features is not None and (features.dtype.kind != "f" or features.ndim != 2)):
        raise ValueError(f"{name} has no numbers")
    if flagged is not None and flagged.ndim != 1:
        raise ValueError(f"{name} has flags of another shape")


def _plain(found: tuple[Detection, ...] | None) -> list[list[Any]] | None:
    return None if found is None else [[one.label, one.score] for one in found]


def _detections(found: list[tuple[str, float]] | None) -> tuple[Detection, ...] | None:
    return None if found is None else tuple(Detection(label, score) for label, score in found)
