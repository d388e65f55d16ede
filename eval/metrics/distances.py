"""Distances of two sets of images in a network's features: pure functions of arrays.

On Inception's features the Fréchet distance is FID and the kernel distance KID.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.score import Z95, Interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.judges.judge import HeldOut

COMPONENTS = 32
NEIGHBOURS = 3
_BLOCK = 1024  # rows of a table of all pairs that are in memory at a time


def frechet_distance(
    mean1: NDArray[np.float64], cov1: NDArray[np.float64], mean2: NDArray[np.float64], cov2: NDArray[np.float64]
) -> float:
    """Return |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), the squared 2-Wasserstein distance of two Gaussians.

    Means [d] and symmetric positive semidefinite covariances [d, d] (Dowson and Landau 1982). The trace of the root
    comes from the eigenvalues of C2^½ C1 C2^½, which is symmetric, so singular covariances do no harm.
    """
    return _distance(mean1, cov1, mean2, cov2)[0]


def component_distance(
    features: NDArray[np.floating[Any]],
    reference: NDArray[np.floating[Any]],
    weights: NDArray[np.float64] | None = None,
) -> tuple[float, Interval]:
    """Return the Fréchet distance in the reference's leading principal components, and its interval.

    In more dimensions a covariance of some hundred images is mostly noise. ``weights`` [m] of the reference are equal
    by default.
    """
    features, reference = features.astype(np.float64), reference.astype(np.float64)
    # eigh sorts ascending: the leading axes are the last.
    _, axes = np.linalg.eigh(np.cov(reference, rowvar=False, aweights=weights))
    axes = axes[:, -COMPONENTS:]
    return frechet_features(features @ axes, reference @ axes, weights)


def held_out_distance(
    features: NDArray[np.floating[Any]], asked: Sequence[tuple[str, str]], held_out: HeldOut
) -> tuple[float, Interval, int, int]:
    """Return the Fréchet distance of features [n, d] to held-out real images, its interval, and both counts.

    ``asked`` are the (object, style) of each image. The real images are weighted to the same mix of these, so the
    erased concept has no part in it. The interval is of the features, the real images held fixed. Few samples inflate
    the distance, so that distances compare at equal n only. Raises RequestError when fewer than two images can be
    compared.
    """
    known = set(held_out.labels)
    kept = np.array([pair in known for pair in asked], bool)
    if kept.sum() < 2:  # a covariance needs two
        raise RequestError(
            "images", f"({kept.sum()})", "needs at least two retain rows that ask for what the held-out images show"
        )
    wanted, there = Counter(pair for pair in asked if pair in known), Counter(held_out.labels)
    weights = np.array([wanted[pair] / there[pair] for pair in held_out.labels])
    used = weights > 0
    value, interval = component_distance(features[kept], held_out.features[used], weights[used])
    return value, interval, int(kept.sum()), int(used.sum())


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
