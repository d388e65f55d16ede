"""A TorchScript module as a judge.

Such a module is a program: loading and using it runs what its author wrote. So no file is taken for one unless the
name says torchscript. The module takes RGB in [0, 1], float32 [n, 3, h, w], of the images' own size, and returns logits
[n, classes]. It scales and normalises the images itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.classifier import Classifier, classifier_judge, first_line, loading, make_classifier
from erase_concept.eval.judges.judge import Judge, LoadedJudge
from erase_concept.pipelines.classifiers.weights import labels_beside
from erase_concept.settings import described, settings


@settings
class TorchScriptSettings:
    """Which module."""

    file: Annotated[str, described("The module's file; the labels lie beside it in a .txt file, one a line.")]


def network(file: str) -> Classifier:
    """Load a module and the labels beside it; raises RequestError when it is none, or has no labels."""
    with loading(f"torchscript:{file}"):
        return _network(file)


def _network(value: str) -> Classifier:
    import torch
    from torchvision import transforms

    file = Path(value)
    labels = labels_beside(file)
    if labels is None:
        raise ValueError(f"needs the labels, one a line, in {file.with_suffix('.txt')}")
    try:
        weights = hashlib.sha256(file.read_bytes()).hexdigest()
        network = torch.jit.load(file, map_location="cpu")
    except (OSError, RuntimeError) as problem:
        raise ValueError(f"is no TorchScript module: {first_line(problem)}") from problem
    return make_classifier(f"torchscript:{file.name}", network, labels, transforms.ToTensor(), weights=weights)


def _load(chosen: TorchScriptSettings, cache: Path | None) -> LoadedJudge:
    return classifier_judge(network(chosen.file))


JUDGES.add(
    Judge(
        "torchscript",
        "A TorchScript module",
        "A classifier from a TorchScript file, which is a program: use those alone that you trust.",
        _load,
        TorchScriptSettings,
        value="file",
    )
)
