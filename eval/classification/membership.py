"""Membership attacks: which forgotten images would an attacker still call training images.

Pure functions of arrays. The attacks return for the forgotten images whether they call them *no* members, bool [n].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from erase_concept.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

ENOUGH = 64  # shadow models, from which on each image has a variance of its own (arXiv 2112.03570, section VI)


def svc_confidence(retain: Floats, test: Floats, forget: Floats) -> NDArray[np.bool_]:
    """Attack by a support vector machine on the confidence, the probability of an image's true class (each [n]).

    It learns to tell retained images, members, from test images; there should be as many of each. It has a kernel of
    radial basis functions, C = 3 and gamma = 1, scikit-learn's "auto" for a single feature (arXiv 2304.04934, appendix
    C.3, and SalUn's code). Raises RequestError where scikit-learn is missing.
    """
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise RequestError("metric", "mia", 'needs scikit-learn: pip install "erase-concept[classification]"') from None
    attack = SVC(C=3, kernel="rbf", gamma="auto")
    attack.fit(np.concatenate([retain, test])[:, None], np.repeat([1, 0], [len(retain), len(test)]))
    called: NDArray[np.bool_] = attack.predict(forget[:, None]) == 0
    return called


def loss_threshold(retain: Floats, test: Floats, forget: Floats) -> NDArray[np.bool_]:
    """Attack by a threshold of the loss (each [n]): what lies above it is no member (Yeom et al., arXiv 1709.01604).

    The threshold is a loss of the retained or test images, at which the mean of the shares of both that are called
    rightly is greatest; of equals the smallest.
    """
    every = np.unique(np.concatenate([retain, test]))
    members = np.searchsorted(np.sort(retain), every, side="right") / len(retain)
    others = 1 - np.searchsorted(np.sort(test), every, side="right") / len(test)
    called: NDArray[np.bool_] = forget > every[int(np.argmax(members + others))]
    return called


def likelihood_ratio(observed: Floats, shadow: Floats, member: NDArray[np.bool_]) -> Floats:
    """Return the logarithm of LiRA's likelihood ratio of each image, [n]: the larger, the likelier it is a member.

    log N(phi; mu_in, s_in^2) - log N(phi; mu_out, s_out^2)  (Carlini et al. 2022, arXiv 2112.03570, algorithm 1).
    ``observed`` are the attacked model's phi [n], the logarithms of p / (1 - p), p the probability of an image's true
    class. ``shadow`` [models, n] are those of models of which it is known whether each image was a ``member`` of their
    training images. The normal distributions are those of the models with the image and of those without; there must
    be two of each. Of fewer than 64 models the variances are means over all images.
    """
    inside, outside = (_log_density(observed, *_normal(shadow, which)) for which in (member, ~member))
    return inside - outside


def offline_likelihood(observed: Floats, shadow: Floats, member: NDArray[np.bool_]) -> Floats:
    """Return LiRA's offline score of each image, [n], which asks the models without the image alone.

    It is  - log Pr[Z > phi],  Z ~ N(mu_out, s_out^2), which rises with the paper's  1 - Pr[Z > phi]. The arrays are
    those of ``likelihood_ratio``.
    """
    import torch

    mean, deviation = _normal(shadow, ~member)
    found: Floats = -torch.special.log_ndtr(torch.from_numpy((mean - observed) / deviation)).numpy()
    return found


def _normal(shadow: Floats, which: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each image's values, over those models that are marked."""
    counts = which.sum(0)
    if counts.min() < 2:
        raise ValueError("each image needs two shadow models with it and two without")
    mean = np.where(which, shadow, 0).sum(0) / counts
    squares = np.where(which, (shadow - mean) ** 2, 0).sum(0)
    if len(shadow) < ENOUGH:
        variance = np.full_like(mean, squares.sum() / (counts - 1).sum())
    else:
        variance = squares / (counts - 1)
    return mean, np.sqrt(np.maximum(variance, 1e-12))


def _log_density(value: Floats, mean: Floats, deviation: Floats) -> Floats:
    """Return the logarithm of a normal density, but for the term that all have."""
    found: Floats = -(((value - mean) / deviation) ** 2) / 2 - np.log(deviation)
    return found
