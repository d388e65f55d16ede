"""Image classifiers of transformers, by hub id or folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.classifier import (
    Classifier,
    classifier_judge,
    loading,
    make_classifier,
    shown_name,
    why_not,
)
from erase_concept.eval.judges.judge import Judge, LoadedJudge
from erase_concept.settings import described, settings


@settings
class HfSettings:
    """Which of the hub's classifiers."""

    model: Annotated[str, described("A hub id such as google/vit-base-patch16-224, or a folder.")]


def network(model: str) -> Classifier:
    """Load a classifier by hub id or from a folder.

    Raises RequestError when it is not there, has no head for classes, or does not say what its outputs mean.
    """
    with loading(f"hf:{model}"):
        return _network(model)


def _network(value: str) -> Classifier:
    import torch
    from huggingface_hub import constants
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from erase_concept.pipelines.hub import silence_hub_logs

    local = Path(value).is_dir()
    if not local and (value.count("/") > 1 or value.startswith(("/", ".", "~"))):
        raise ValueError(f"there is no folder {value}")
    options = {"local_files_only": local or constants.HF_HUB_OFFLINE, "trust_remote_code": False}
    try:
        with silence_hub_logs():
            network, loaded = AutoModelForImageClassification.from_pretrained(
                value, dtype=torch.float32, output_loading_info=True, **options
            )
            scaler = AutoImageProcessor.from_pretrained(value, **options)
    except Exception as problem:  # of every kind: the configuration's, the file's, the HTTP library's
        raise ValueError(why_not(problem)) from problem
    if missing := sorted(loaded["missing_keys"]):  # transformers makes them up at random
        raise ValueError(f"has no weights for {', '.join(missing)}: it was trained for something else")
    labels = tuple(network.config.id2label.get(place) for place in range(network.config.num_labels))
    if None in labels or labels == tuple(f"LABEL_{place}" for place in range(len(labels))):
        raise ValueError("its configuration does not say what its outputs mean (id2label)")
    return make_classifier(
        f"hf:{shown_name(value)}",
        network,
        labels,
        lambda picture: scaler(images=picture, return_tensors="pt")["pixel_values"][0],
        lambda batch: network(pixel_values=batch).logits,
    )


def _load(chosen: HfSettings, cache: Path | None) -> LoadedJudge:
    return classifier_judge(network(chosen.model))


JUDGES.add(
    Judge(
        "hf", "A classifier of transformers", "Any image classifier of transformers.", _load, HfSettings, value="model"
    )
)
