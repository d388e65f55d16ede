"""timm's classifiers, with weights from the hub's cache, the hub, a folder, or a local file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.classifier import (
    Classifier,
    classifier_judge,
    imagenet_labels,
    loading,
    make_classifier,
    shown_name,
    why_not,
)
from erase_concept.eval.judges.judge import Judge, LoadedJudge
from erase_concept.pipelines.classifiers.weights import fill_weights, read_state
from erase_concept.settings import described, settings


@settings
class TimmSettings:
    """Which of timm's classifiers."""

    model: Annotated[
        str, described("Its name, such as resnet50.a1_in1k; NAME=FILE for a file of weights, local-dir:FOLDER.")
    ]


def network(model: str) -> Classifier:
    """Load a classifier: a timm name, ``NAME=FILE`` with a local state dict, or ``local-dir:FOLDER`` that timm saved.

    Labels may lie in a file beside the weights, as torchvision's. Raises RequestError when there is no such model, its
    weights are not there, or nothing says what its outputs mean.
    """
    with loading(f"timm:{model}"):
        return _network(model)


def _network(value: str) -> Classifier:
    try:
        import timm
    except ImportError:
        raise ValueError('needs timm: pip install "erase-concept[classifiers]"') from None
    architecture, _, file = value.partition("=")
    state, labels = read_state(Path(file)) if file else (None, None)
    try:
        network = timm.create_model(architecture, pretrained=not file, num_classes=len(labels) if labels else None)
    except Exception as problem:  # an unknown name, no weights, or those of the HTTP library, another in each version
        raise ValueError(why_not(problem)) from problem
    if state is not None:
        fill_weights(network, state)
    labels = labels or _timm_labels(network.pretrained_cfg, network.num_classes)
    if not labels:
        raise ValueError(f"does not say what its {network.num_classes} outputs mean")
    scale = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    return make_classifier(f"timm:{shown_name(architecture)}", network, labels, scale)


def _timm_labels(about: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Return a timm model's labels: its own, or ImageNet's where their number is that of one of its sets."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if names := about.get("label_names"):
        described = about.get("label_descriptions") or {}
        return tuple(described.get(label, label) for label in names)
    if classes == 1000:
        return imagenet_labels()
    subset = infer_imagenet_subset({"num_classes": classes})
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else ()


def _load(chosen: TimmSettings, cache: Path | None) -> LoadedJudge:
    return classifier_judge(network(chosen.model))


JUDGES.add(Judge("timm", "A timm classifier", "Any of timm's image classifiers.", _load, TimmSettings, value="model"))
