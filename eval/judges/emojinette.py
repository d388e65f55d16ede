"""The built-in model's own classifier: the objects and the styles that it draws, at 64 x 64 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.features import Extractor, read_image
from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.judge import HeldOut, Judge, Judgement, LoadedJudge
from erase_concept.files import file_sha256
from erase_concept.pipelines import emojinette
from erase_concept.settings import NoSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from erase_concept.pipelines.emojinette.classifier import EmojinetteClassifier

NAME = "emojinette"
SIZE = 64  # pixels
_AT_ONCE = 64  # images in memory
OBJECTS, STYLES = emojinette.CATALOG.labels, emojinette.CATALOG.styles
KINDS = ("object",) * len(OBJECTS) + ("style",) * len(STYLES)
_SYNONYMS = {name: names.label for names in emojinette.CATALOG.objects for name in (names.synonym, names.unseen)}


def classify(images: NDArray[np.uint8], network: EmojinetteClassifier, *, batch_size: int = _AT_ONCE) -> Judgement:
    """Classify images, uint8 [n, 64, 64, 3].

    The scores are probabilities, of the objects and of the styles each. Raises ValueError for images of another type
    or shape.
    """
    import torch

    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        asked = f"[n, {SIZE}, {SIZE}, 3]"
        raise ValueError(f"the classifier takes uint8 images {asked}, not {images.dtype} {[*images.shape]}")
    features, scores = [], []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
            found = network.features(batch)
            features.append(found.numpy())
            scores.append(torch.cat([logits.softmax(1) for logits in network.heads(found)], 1).numpy())
    table = np.concatenate(scores)
    best = zip(table[:, : len(OBJECTS)].argmax(1), table[:, len(OBJECTS) :].argmax(1), strict=True)
    words = tuple(f"{OBJECTS[o]}, {STYLES[s]}" for o, s in best)
    return Judgement((*OBJECTS, *STYLES), table, KINDS, words=words, features=np.concatenate(features))


def read_held_out(file: Path) -> HeldOut:
    """Read ``features`` [n, d], ``object`` [n] and ``style`` [n] (places in the lists of labels) of real images."""
    from safetensors.numpy import load_file

    held = load_file(file)
    pairs = zip(held["object"].tolist(), held["style"].tolist(), strict=True)
    labels = tuple((OBJECTS[o], STYLES[s]) for o, s in pairs)
    return HeldOut(held["features"].astype(np.float64), labels, file_sha256(file))


def extractor() -> Extractor:
    """Return the features [n, 96] under both heads; they take images of 64 x 64 pixels."""
    from erase_concept.pipelines.emojinette.classifier import load_classifier
    from erase_concept.pipelines.model import weights_hash
    from erase_concept.pipelines.processes import processes

    module = load_classifier(emojinette.CLASSIFIER).to(processes().device)

    def features(images: Tensor) -> Tensor:
        if images.shape[2:] != (SIZE, SIZE):
            given = " x ".join(str(side) for side in images.shape[:1:-1])
            raise RequestError("metric.extractor", NAME, f"takes images of {SIZE} x {SIZE} pixels, not {given}")
        return module.features(images.float() / 255)

    return Extractor(NAME, "Emojinette's classifier", weights_hash(module), features)


def _load(chosen: NoSettings, cache: Path | None) -> LoadedJudge:
    from erase_concept.pipelines.emojinette.classifier import load_classifier

    network = load_classifier(emojinette.CLASSIFIER)
    weights = file_sha256(emojinette.CLASSIFIER)

    def judge(files: Sequence[Path]) -> Judgement:
        starts = range(0, len(files), _AT_ONCE)
        some = (np.stack([_scaled(file) for file in files[start : start + _AT_ONCE]]) for start in starts)
        found = [classify(images, network, batch_size=_AT_ONCE) for images in some]
        return Judgement(
            (*OBJECTS, *STYLES),
            np.concatenate([one.scores for one in found]),
            KINDS,
            words=tuple(word for one in found for word in one.words),
            features=np.concatenate([one.features for one in found if one.features is not None]),
        )

    name = f"{NAME} (sha256 {weights[:12]})"
    held_out = read_held_out(emojinette.REFERENCE)
    return LoadedJudge(name, (*OBJECTS, *STYLES), judge, KINDS, weights, _SYNONYMS, held_out)


def _scaled(file: Path) -> NDArray[np.uint8]:
    """Read an image, and scale and crop it to 64 x 64 pixels where it is of another size."""
    from PIL import Image
    from torchvision.transforms import CenterCrop, Resize

    image = read_image(file)
    if image.shape[:2] == (SIZE, SIZE):
        return image
    return np.asarray(CenterCrop(SIZE)(Resize(SIZE)(Image.fromarray(image))))


JUDGES.add(
    Judge(
        NAME,
        "Emojinette's classifier",
        "The 20 objects and 4 styles that the built-in model draws.",
        _load,
        extractor=extractor,
    )
)
