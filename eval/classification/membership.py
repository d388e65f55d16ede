"""Membership attacks: which forgotten images would an attacker still call training images.

Pure functions of arrays. Each returns for the forgotten images whether the attack calls them *no* members, bool [n].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from erase_concept.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]


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
