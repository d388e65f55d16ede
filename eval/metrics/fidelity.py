"""How far images have drifted from others, in the features of a named network.

FID and KID are the distances in the features of one network alone, Inception with its weights of 2015-12-05. In any
other network's features the same formulas are called Fréchet and kernel distance here, and the network is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.features import Extractor, image_features
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.distances import (
    COMPONENTS,
    NEIGHBOURS,
    component_distance,
    frechet_features,
    held_out_distance,
    kernel_distance,
    precision_recall,
)
from erase_concept.eval.metrics.extractors import INCEPTION, choose_extractor, extractor
from erase_concept.eval.metrics.metric import (
    JudgedImages,
    Metric,
    MetricContext,
    MetricInput,
    MetricResult,
    PreparedMetric,
    single,
)
from erase_concept.eval.score import Score, wilson
from erase_concept.settings import described, settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENOUGH = 2048  # images for a FID: as many as Inception has features, without which the covariance has not full rank
HELD_OUT = "held-out"
NAMES = ("frechet", "kernel", "precision", "recall")
_FRECHET_UNIT, _KERNEL_UNIT = "squared feature distance", "squared kernel distance"
_FOUR_IMAGES = "needs {count} or more on either side"


@settings
class DistanceSettings:
    """In whose features, and to which images, distances are measured."""

    extractor: Annotated[
        str | None,
        described("The network: inception, or a judge with features. Without one: Inception where it is installed."),
    ] = None
    inception: Annotated[Path | None, described("The file of Inception's weights, where torch's cache has none.")] = (
        None
    )
    reference: Annotated[
        str | None,
        described("A folder of real images, or held-out for those of the judge. Without it: the base model's images."),
    ] = None


def fidelity(
    files: Sequence[Path],
    reference: Sequence[Path],
    network: Extractor,
    *,
    target: str,
    metrics: Sequence[str] = NAMES,
    cache: Path | None = None,
    paired: bool = False,
) -> tuple[Score, ...]:
    """Return the ``distances`` of two sets of image files, of which ``cache`` keeps the features."""
    features = [image_features(some, network, cache=cache) for some in (files, reference)]
    return distances(features[0], features[1], network, target=target, metrics=metrics, paired=paired)


def score_name(metric: str, network: Extractor) -> str:
    """Return the name of a metric's score in the features of a network: ``fid`` for Fréchet's with Inception."""
    if network.name == INCEPTION and metric in ("frechet", "kernel"):
        return {"frechet": "fid", "kernel": "kid"}[metric]
    return f"{metric}_{network.suffix}"


def distances(
    features: NDArray[np.float32],
    reference: NDArray[np.float32],
    network: Extractor,
    *,
    target: str,
    metrics: Sequence[str] = NAMES,
    paired: bool = False,
) -> tuple[Score, ...]:
    """Return the distances of features [n, d] to a reference [m, d]: Fréchet, kernel, precision and recall.

    With Inception the first two are ``fid`` and ``kid``. With another network their names end in its name, and the
    Fréchet distance is of the reference's 32 leading principal components, for which fewer images will do. Precision
    and recall end in the network's name with either; in their paper it is VGG-16's. Recall is a share of the m.
    ``paired`` is for ``kernel_distance``. Raises RequestError when there are fewer than four images on either side.
    """
    n, m = len(features), len(reference)
    if min(n, m) <= NEIGHBOURS:
        raise RequestError("images", f"({n} images against {m})", _FOUR_IMAGES.format(count=NEIGHBOURS + 1))
    of = f"{network.title}, {features.shape[1]} features; {n} images against {m}"
    found = []
    if "frechet" in metrics:
        found.append(_frechet(features, reference, network, target, of))
    if "kernel" in metrics:
        value, interval = kernel_distance(features, reference, paired=paired)
        drawn = "all pairs but those of one seed" if paired else "all pairs"
        protocol = f"{of}; cubic kernel, unbiased, {drawn}; jackknife; lower is better"
        found.append(Score(score_name("kernel", network), target, value, n, interval, _KERNEL_UNIT, protocol))
    if {"precision", "recall"} & {*metrics}:
        nearest = f"{of}; {NEIGHBOURS} nearest neighbours (Kynkäänniemi et al. 2019); Wilson"
        for name, share, count in zip(
            ("precision", "recall"), precision_recall(features, reference), (n, m), strict=True
        ):
            if name in metrics:
                interval = wilson(round(share * count), count)
                found.append(Score(score_name(name, network), target, share, count, interval, "fraction", nearest))
    return tuple(found)


def _frechet(
    features: NDArray[np.float32], reference: NDArray[np.float32], network: Extractor, target: str, of: str
) -> Score:
    """Return FID, or the Fréchet distance of the leading components in another network's features."""
    n, m = len(features), len(reference)
    if network.name == INCEPTION:
        value, interval = frechet_features(features, reference)
        warning = f"; WARNING: with fewer than {ENOUGH:,} images it is inflated and compares with no published FID"
        protocol = f"{of}; jackknife; lower is better{warning if min(n, m) < ENOUGH else ''}"
    else:
        value, interval = component_distance(features, reference, np.ones(m))
        parts = min(COMPONENTS, features.shape[1])
        protocol = f"{of}; {parts} principal components; jackknife; lower is better; compares at equal counts only"
    return Score(score_name("frechet", network), target, value, n, interval, _FRECHET_UNIT, protocol)


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder and the folders in it; raises RequestError when there are none."""
    from erase_concept.pipelines.pictures import SUFFIXES, pictures_in

    if not folder.is_dir():
        raise RequestError("metric.reference", folder, "no such folder")
    found = pictures_in(folder, deep=True)
    if not found:
        raise RequestError("metric.reference", folder, f"holds no images ({', '.join(SUFFIXES)})")
    return found


def _prepare(metric: str) -> Callable[[MetricContext], PreparedMetric]:
    """Return how one of the four metrics is prepared."""

    def prepare(context: MetricContext) -> PreparedMetric:
        chosen: DistanceSettings = context.settings
        if chosen.reference == HELD_OUT:
            return _prepare_held_out(metric, context)
        reference = None if chosen.reference is None else image_files(Path(chosen.reference))
        if reference is None and not context.baseline:
            raise RequestError(
                "baseline", "(not given)", "a distance needs the base model's images, or metric.reference"
            )
        network, instead = choose_extractor(chosen.extractor, chosen.inception, context.judges)
        missing = {score_name(metric, replace(network, name=INCEPTION)): instead} if instead else {}
        about = {"extractor": {"name": network.name, "weights": network.weights}}

        def compute(data: MetricInput) -> MetricResult:
            score = _to_reference(data, metric, network, reference) if reference else _to_base(data, metric, network)
            return MetricResult((score,), missing=missing if metric in ("frechet", "kernel") else {}, provenance=about)

        return PreparedMetric((score_name(metric, network),), compute)

    return prepare


def _to_base(data: MetricInput, metric: str, network: Extractor) -> Score:
    """Return the distance of the erased model's retained images to the base model's of the same seeds."""
    assert data.base is not None
    files, others = (data.files(side, data.retain) for side in (data.erased, data.base))
    (score,) = fidelity(files, others, network, target=data.concept, metrics=(metric,), cache=data.cache, paired=True)
    return replace(score, protocol=f"erased against base model's images of what was to stay; {score.protocol}")


def _to_reference(data: MetricInput, metric: str, network: Extractor, reference: Sequence[Path]) -> Score:
    """Return the distance of either model's retained images to real ones."""

    def of(side: JudgedImages) -> Score:
        files = data.files(side, data.retain)
        return fidelity(files, reference, network, target=data.concept, metrics=(metric,), cache=data.cache)[0]

    return data.with_baseline(of)


def _prepare_held_out(metric: str, context: MetricContext) -> PreparedMetric:
    """Prepare the Fréchet distance to the real images that a judge brings along, in its own features."""
    names = [name for name, judge in context.judges.items() if judge.held_out is not None]
    if metric != "frechet" or not names:
        why = "is for the Fréchet distance alone" if metric != "frechet" else "no judge here brings real images along"
        raise RequestError("metric.reference", HELD_OUT, why)
    return single("frechet", lambda data: _to_held_out(data, names[0]))


def _to_held_out(data: MetricInput, judge: str) -> Score:
    """Return the distance of either model's images that ask for what held-out real ones show to these."""
    loaded = data.judges[judge]
    held_out, name = loaded.held_out, loaded.name
    assert held_out is not None  # else the metric was not prepared
    known, nothing = set(held_out.labels), ("",) * len(data.forget)
    asked = list(
        zip(*(data.asked(kind) if loaded.knows(kind) else nothing for kind in ("object", "style")), strict=True)
    )
    chosen = data.retain & np.array([pair in known for pair in asked], bool)
    pairs = [asked[place] for place in np.flatnonzero(chosen)]

    def of(side: JudgedImages) -> Score:
        features = side.judgements[judge].features
        assert features is not None  # a judge with held-out images returns features
        value, interval, n, m = held_out_distance(features[chosen], pairs, held_out)
        protocol = (
            f"{name}, {min(COMPONENTS, features.shape[1])} principal components of {features.shape[1]} features; "
            f"{n} images of retain prompts against {m} held-out real images of the same labels; jackknife; "
            "lower is better"
        )
        return Score("frechet", data.concept, value, n, interval, _FRECHET_UNIT, protocol)

    return data.with_baseline(of)


def _prepare_imagenet(context: MetricContext) -> PreparedMetric:
    """Prepare the Fréchet distance between both models' retained images that name an object and a style."""
    context.need_base("frechet_imagenet")
    network = extractor("efficientnet-lite2")

    def compute(data: MetricInput) -> Score:
        assert data.base is not None
        asked = zip(data.asked("object"), data.asked("style"), strict=True)
        chosen = data.retain & np.array([bool(thing and style) for thing, style in asked], bool)
        if chosen.sum() < 2:  # a covariance needs two
            raise RequestError("images", f"({chosen.sum()})", "needs at least two retain rows with object and style")
        features, base = (
            image_features(data.files(side, chosen), network, batch_size=4, cache=data.cache)
            for side in (data.erased, data.base)
        )
        value, interval = component_distance(features, base, np.ones(len(base)))
        protocol = (
            f"{network.title}, {COMPONENTS} principal components of {features.shape[1]} features; {len(features)} "
            "images of retain prompts against the base model's of the same seeds; jackknife; lower is better"
        )
        n = len(features)
        return Score("frechet_imagenet", data.concept, value, n, interval, _FRECHET_UNIT, protocol)

    return single("frechet_imagenet", compute)


def _prepare_inception(metric: str) -> Callable[[MetricContext], PreparedMetric]:
    """Return how FID or KID is prepared: the same distance with Inception or not at all."""

    def prepare(context: MetricContext) -> PreparedMetric:
        chosen: DistanceSettings = context.settings
        return _prepare(metric)(replace(context, settings=replace(chosen, extractor=INCEPTION)))

    return prepare


METRICS.add(
    Metric(
        "fid",
        "FID",
        "Fréchet distance of two sets of images in the features of Inception.",
        "retain",
        "lower",
        _FRECHET_UNIT,
        settings=DistanceSettings,
        prepare=_prepare_inception("frechet"),
    )
)
METRICS.add(
    Metric(
        "kid",
        "KID",
        "Kernel distance of two sets of images in the features of Inception.",
        "retain",
        "lower",
        _KERNEL_UNIT,
        settings=DistanceSettings,
        prepare=_prepare_inception("kernel"),
    )
)
METRICS.add(
    Metric(
        "frechet",
        "Fréchet distance",
        "Fréchet distance of the retained images in a named network's features.",
        "retain",
        "lower",
        _FRECHET_UNIT,
        settings=DistanceSettings,
        prepare=_prepare("frechet"),
    )
)
METRICS.add(
    Metric(
        "frechet_imagenet",
        "Fréchet distance to the base model",
        "Fréchet distance between the retained images of both models, in an ImageNet network's features.",
        "retain",
        "lower",
        _FRECHET_UNIT,
        prepare=_prepare_imagenet,
    )
)
METRICS.add(
    Metric(
        "kernel",
        "Kernel distance",
        "Kernel distance of the retained images in a named network's features.",
        "retain",
        "lower",
        _KERNEL_UNIT,
        settings=DistanceSettings,
        prepare=_prepare("kernel"),
    )
)
METRICS.add(
    Metric(
        "precision",
        "Precision",
        "Share of the retained images that lie among the reference's, in a named network's features.",
        "retain",
        "higher",
        settings=DistanceSettings,
        prepare=_prepare("precision"),
    )
)
METRICS.add(
    Metric(
        "recall",
        "Recall",
        "Share of the reference's images that lie among the retained ones, in a named network's features.",
        "retain",
        "higher",
        settings=DistanceSettings,
        prepare=_prepare("recall"),
    )
)
