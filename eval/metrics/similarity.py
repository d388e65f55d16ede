"""How far retained images moved: differences between two models' images, pair by pair of one prompt and seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.features import image_features, read_image
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.extractors import choose_extractor
from erase_concept.eval.metrics.metric import Metric, MetricContext, MetricInput, MetricResult, PreparedMetric
from erase_concept.eval.score import Score, bootstrap
from erase_concept.settings import described, settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.features import Extractor
    from erase_concept.eval.metrics.metric import JudgedImages
    from erase_concept.pipelines.image_set import ImageSet

Measure = Callable[["NDArray[np.uint8]", "NDArray[np.uint8]"], float]

SEED = 0
_ALEXNET = "alexnet-owt-7be5be79.pth"


def similarity(
    erased: ImageSet,
    base: ImageSet,
    measures: Sequence[str] = ("pixel_distance",),
    extractor: Extractor | None = None,
    *,
    target: str,
    batch_size: int = 8,
    cache: Path | None = None,
) -> tuple[Score, ...]:
    """Return the mean of each measure over the pairs at the same places of two sets, with a bootstrap interval.

    Give the retained rows alone to learn how far these moved. With an extractor the distance of its features, which
    ``cache`` keeps, is measured too. Raises RequestError when the sets' rows or a pair's sizes differ, for a
    measure that is none of MEASURES, and for one without the package or the weights that it needs.
    """
    folders = [images.files[0].parent if images.files else "(empty)" for images in (erased, base)]
    if erased.rows != base.rows:
        raise RequestError("baseline", folders[1], f"its prompts or seeds are not those of {folders[0]}")
    if not erased.rows:
        raise RequestError("images", folders[0], "no images")
    scores = []
    for name in measures:
        if name not in MEASURES:
            raise RequestError("metric", name, f"no such measure; allowed: {', '.join(MEASURES)}")
        unit, about, load = MEASURES[name]
        scores.append(_mean(name, target, _paired(erased.files, base.files, load()), unit, about))
    if extractor is not None:
        some = (
            image_features(images.files, extractor, batch_size=batch_size, cache=cache) for images in (erased, base)
        )
        name = f"feature_distance_{extractor.suffix}"
        about = f"{extractor.title}, 1 - cos of the features; lower is nearer"
        scores.append(_mean(name, target, feature_distance(*some), "cosine distance", about))
    return tuple(scores)


def pixel_distance(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Return the mean absolute difference of two images, uint8 [h, w, 3], in grey levels from 0 to 255."""
    return float(np.abs(image.astype(np.int16) - other).mean())


def feature_distance(features: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return 1 - cos of the rows at the same places of two tables of features [n, d], as [n]: from 0 to 2."""
    left, right = features.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    distance: NDArray[np.float64] = 1 - (left * right).sum(1) / lengths
    return distance.clip(0, 2)  # rounding may put equals a little below 0


def _ssim() -> Measure:
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise RequestError("metric", "ssim", "needs scikit-image: pip install scikit-image") from None

    def ssim(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return float(structural_similarity(image, other, channel_axis=2, data_range=255, **settings))

    return ssim


def _lpips() -> Measure:
    import torch

    from erase_concept.pipelines.processes import processes

    try:
        from lpips import LPIPS
    except ImportError:
        raise RequestError("metric", "lpips", "needs lpips: pip install lpips") from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
    if not file.is_file():
        url = f"https://download.pytorch.org/models/{_ALEXNET}"
        raise RequestError("metric", "lpips", f"needs AlexNet's weights: put {url} into {file.parent}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision in words that are deprecated there
        network = LPIPS(net="alex", verbose=False).to(processes().device)

    def lpips(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
        both = torch.from_numpy(np.stack([image, other])).permute(0, 3, 1, 2).to(processes().device) / 127.5 - 1
        with torch.inference_mode():
            return float(network(both[:1], both[1:]))

    return lpips


# Name: (unit, what the protocol says, how to get the function of two images)
MEASURES: dict[str, tuple[str, str, Callable[[], Measure]]] = {
    "pixel_distance": (
        "grey levels",
        "mean absolute difference of all pixels and channels, of 255; lower is nearer",
        lambda: pixel_distance,
    ),
    "ssim": ("SSIM", "SSIM (Wang et al. 2004), mean over the channels; higher is nearer, 1 is equal", _ssim),
    "lpips": ("LPIPS", "LPIPS 0.1 with AlexNet (Zhang et al. 2018); lower is nearer", _lpips),
}


def _paired(files: Sequence[Path], others: Sequence[Path], measure: Measure) -> NDArray[np.float64]:
    """Return the measure of each pair of image files [n]."""
    values = []
    for file, other in zip(files, others, strict=True):
        image, before = read_image(file), read_image(other, setting="baseline")
        if image.shape != before.shape:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (before.shape, image.shape)]
            raise RequestError("baseline", other, f"is of {sizes[0]} pixels, {file} of {sizes[1]}")
        values.append(measure(image, before))
    return np.array(values)


def _mean(name: str, target: str, values: NDArray[np.float64], unit: str, about: str) -> Score:
    interval = bootstrap(lambda places: float(values[places].mean()), len(values), np.random.default_rng(SEED))
    protocol = f"erased against base model's image of the same prompt and seed, mean of pairs; {about}; bootstrap"
    return Score(name, target, float(values.mean()), len(values), interval, unit, protocol)


@settings
class FeatureDistanceSettings:
    """In whose features images have distances."""

    extractor: Annotated[
        str | None,
        described("The network: inception, or a judge with features. Without one: Inception where it is installed."),
    ] = None


def _retained(data: MetricInput, side: JudgedImages) -> ImageSet:
    """Return the images of one model that ask for nothing that was erased."""
    places = np.flatnonzero(data.retain)
    images = side.images
    files, rows = tuple(images.files[at] for at in places), tuple(images.rows[at] for at in places)
    return replace(images, files=files, rows=rows)


def _prepare_pairs(name: str) -> Callable[[MetricContext], PreparedMetric]:
    """Return how one of ``MEASURES`` is prepared."""

    def prepare(context: MetricContext) -> PreparedMetric:
        context.need_base(name)
        MEASURES[name][2]()  # raises where a package or weights are missing

        def compute(data: MetricInput) -> MetricResult:
            assert data.base is not None
            erased, base = _retained(data, data.erased), _retained(data, data.base)
            return MetricResult(similarity(erased, base, (name,), target=data.concept))

        return PreparedMetric((name,), compute)

    return prepare


def _prepare_features(context: MetricContext) -> PreparedMetric:
    context.need_base("feature_distance")
    network, _ = choose_extractor(context.settings.extractor, None, context.judges)

    def compute(data: MetricInput) -> MetricResult:
        assert data.base is not None
        erased, base = _retained(data, data.erased), _retained(data, data.base)
        return MetricResult(similarity(erased, base, (), network, target=data.concept, cache=data.cache))

    return PreparedMetric((f"feature_distance_{network.suffix}",), compute)


METRICS.add(
    Metric(
        "pixel_distance",
        "Pixel distance to the base model's image",
        "Mean difference of the pixels from the base model's image of the same seed.",
        "retain",
        "lower",
        "grey levels",
        prepare=_prepare_pairs("pixel_distance"),
    )
)
METRICS.add(
    Metric(
        "feature_distance",
        "Feature distance to the base model's image",
        "Cosine distance from the base model's image of the same seed, in a named network's features.",
        "retain",
        "lower",
        "cosine distance",
        settings=FeatureDistanceSettings,
        prepare=_prepare_features,
    )
)
METRICS.add(
    Metric(
        "ssim",
        "SSIM to the base model's image",
        "Structural similarity to the base model's image of the same seed; needs scikit-image.",
        "retain",
        "higher",
        "SSIM",
        prepare=_prepare_pairs("ssim"),
    )
)
METRICS.add(
    Metric(
        "lpips",
        "LPIPS to the base model's image",
        "Perceptual distance from the base model's image of the same seed; needs lpips and AlexNet's weights.",
        "retain",
        "lower",
        "LPIPS",
        prepare=_prepare_pairs("lpips"),
    )
)
