"""torchvision's classifiers, with weights from torch's cache, the net, or a local file."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.classifier import Classifier, classifier_judge, first_line, loading, make_classifier
from erase_concept.eval.judges.judge import Judge, LoadedJudge
from erase_concept.pipelines.classifiers.weights import fill_weights, read_state
from erase_concept.settings import described, settings


@settings
class TorchvisionSettings:
    """Which of torchvision's classifiers."""

    model: Annotated[str, described("Its name, such as resnet50; NAME=FILE takes the weights from a file.")]


def network(model: str) -> Classifier:
    """Load a classifier: ``resnet50``, or ``resnet50=FILE`` with the weights of a local state dict.

    A file of labels may lie beside the weights, with the suffix .txt in the place of theirs: one label a line, in the
    order of the outputs. Without one the classes are those of the published weights. Raises RequestError when there is
    no such model, its weights are not there, or they are not the model's.
    """
    with loading(f"torchvision:{model}"):
        return _network(model)


def _network(value: str) -> Classifier:
    from torchvision import models

    architecture, _, file = value.partition("=")
    known = models.list_models(module=models)
    if architecture not in known:
        near = ", ".join(get_close_matches(architecture, known)) or "such as resnet50"
        raise ValueError(f"torchvision has no classifier {architecture!r}; near it: {near}")
    every = models.get_model_weights(architecture)
    # A file under the name of published weights was trained at their resolution, which the others' may not be.
    weights = next((some for some in every if Path(some.url).name == Path(file).name), every.DEFAULT)
    state, labels = read_state(Path(file) if file else _downloaded(weights, architecture))
    labels = labels or tuple(weights.meta["categories"])
    options: dict[str, Any] = {"num_classes": len(labels)}
    if architecture in ("googlenet", "inception_v3"):  # what their published weights were trained with
        options |= {"transform_input": True, "init_weights": False}
    elif architecture.startswith("vit_"):
        options["image_size"] = weights.meta["min_size"][0]
    elif architecture.startswith("densenet"):  # their files have older names, norm.1 for norm1
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): it for key, it in state.items()}
    network = models.get_model(architecture, weights=None, **options)
    fill_weights(network, state)
    return make_classifier(f"torchvision:{architecture}", network, labels, weights.transforms())


def _downloaded(weights: Any, architecture: str) -> Path:
    """Return published weights' file in torch's cache, where a download puts it if it is not there yet."""
    import torch
    from huggingface_hub import constants

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if file.is_file():
        return file
    instead = f"put it there, or say torchvision:{architecture}=FILE"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{file} is not there, and HF_HUB_OFFLINE forbids to download it; {instead}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.url, str(file), file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as problem:
        reason = first_line(problem)
        raise ValueError(f"{file} is not there, and could not be downloaded ({reason}); {instead}") from problem
    return file


def _load(chosen: TorchvisionSettings, cache: Path | None) -> LoadedJudge:
    return classifier_judge(network(chosen.model))


JUDGES.add(
    Judge(
        "torchvision",
        "A torchvision classifier",
        "Any of torchvision's image classifiers, by default with its ImageNet weights.",
        _load,
        TorchvisionSettings,
        value="model",
    )
)
