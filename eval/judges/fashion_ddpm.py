"""The classifier of the built-in DDPM of Fashion-MNIST: its ten classes, at 16 x 16 grey pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from erase_concept.eval.features import read_image
from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.judge import HeldOut, Judge, Judgement, LoadedJudge
from erase_concept.files import file_sha256
from erase_concept.pipelines.fashion_ddpm import CLASSIFIER, LABELS, REFERENCE, SIZE
from erase_concept.settings import NoSettings

NAME = "fashion-ddpm"
_KINDS = ("object",) * len(LABELS)
_SYNONYMS = {"T-shirt/top": "tshirt", "Ankle boot": "boot"}  # the data set's own names
_AT_ONCE = 250


def read_held_out(file: Path) -> HeldOut:
    """Read ``features`` [n, d] and ``object`` [n] (places in the list of labels) of real images."""
    from safetensors.numpy import load_file

    held = load_file(file)
    labels = tuple((LABELS[place], "") for place in held["object"].tolist())
    return HeldOut(held["features"].astype(np.float64), labels, file_sha256(file))


def _load(chosen: NoSettings, cache: Path | None) -> LoadedJudge:
    import torch

    from erase_concept.pipelines.fashion_ddpm.classifier import load_classifier, to_input

    network, weights = load_classifier(CLASSIFIER), file_sha256(CLASSIFIER)

    def judge(files: Sequence[Path]) -> Judgement:
        features = [torch.zeros(0, network.fc.in_features)]
        with torch.inference_mode():
            for start in range(0, len(files), _AT_ONCE):
                images = np.stack([_grey(file) for file in files[start : start + _AT_ONCE]])
                features.append(network.features(to_input(torch.from_numpy(images)[:, None])))
            found = torch.cat(features)
            scores = network.fc(found).softmax(1).numpy()
        words = tuple(LABELS[place] for place in scores.argmax(1))
        return Judgement(LABELS, scores, _KINDS, words=words, features=found.numpy())

    name = f"{NAME} (sha256 {weights[:12]})"
    return LoadedJudge(name, LABELS, judge, _KINDS, weights, _SYNONYMS, read_held_out(REFERENCE))


def _grey(file: Path) -> np.ndarray:
    """Read an image as grey uint8 [16, 16], scaled and cropped where it is of another size."""
    from PIL import Image, ImageOps

    image = Image.fromarray(read_image(file)).convert("L")
    return np.asarray(image if image.size == (SIZE, SIZE) else ImageOps.fit(image, (SIZE, SIZE)))


JUDGES.add(
    Judge(
        NAME,
        "The classifier of the built-in DDPM",
        "The ten classes of Fashion-MNIST that the built-in DDPM draws.",
        _load,
    )
)
