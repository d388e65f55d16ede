"""Image classifiers as judges: which class does an image show, and with which probability.

The files beside this one load classifiers of several libraries; here is what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.features import read_image
from erase_concept.eval.judges.judge import Judgement, LoadedJudge

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor, nn

_AT_ONCE = 64  # images in memory before a classifier


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network, what its outputs mean, and the preprocessing that its library defines for it.

    ``name`` says for protocols which it is, with the start of ``weights``, the SHA-256 of its weights (of a TorchScript
    module: of its file). ``preprocess`` makes a float tensor [3, height, width] of one picture, ``logits`` takes a
    batch of these and returns [n, classes], in the order of ``labels``.
    """

    name: str
    labels: tuple[str, ...]
    weights: str
    preprocess: Callable[[Image.Image], Tensor]
    logits: Callable[[Tensor], Tensor]
    device: torch.device

    def probabilities(self, images: NDArray[np.uint8], batch_size: int = 4) -> NDArray[np.float32]:
        """Return the probability of every class, float32 [n, classes], of RGB images, uint8 [n, h, w, 3].

        Each image goes through the preprocessing alone, so the batch size changes rounding at most. On a CPU small
        batches are the fastest, for they stay in its cache: EfficientNet-Lite2 takes twice as long for an image in
        batches of 16 as in batches of 4. Raises ValueError for images of another type or shape, and EraseError when the
        network fails or returns anything else.
        """
        import torch
        from PIL import Image

        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"classifiers take uint8 images [n, h, w, 3], not {images.dtype} {[*images.shape]}")
        found = np.zeros((len(images), len(self.labels)), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = [self.preprocess(Image.fromarray(image)) for image in images[start : start + batch_size]]
                try:
                    logits = self.logits(torch.stack(batch).to(self.device))
                except (RuntimeError, torch.jit.Error) as problem:  # a module from outside, or too little memory
                    raise EraseError(f"{self.name} failed: {_last_line(problem)}") from problem
                if not isinstance(logits, torch.Tensor) or logits.shape != (len(batch), len(self.labels)):
                    got = [*logits.shape] if isinstance(logits, torch.Tensor) else type(logits).__name__
                    raise EraseError(f"{self.name} returned {got}, not logits [{len(batch)}, {len(self.labels)}]")
                found[start : start + len(batch)] = logits.float().softmax(1).cpu().numpy()
        if not np.isfinite(found).all():
            raise EraseError(f"{self.name} returned values that are no numbers")
        return found


def make_classifier(
    name: str,
    network: nn.Module,
    labels: Sequence[str],
    preprocess: Callable[[Image.Image], Tensor],
    logits: Callable[[Tensor], Tensor] | None = None,
    weights: str | None = None,
) -> Classifier:
    """Return a network as a classifier, on the device that Accelerate picks.

    ``logits`` is by default the network itself, ``weights`` the hash of its weights.
    """
    from erase_concept.pipelines.model import weights_hash
    from erase_concept.pipelines.processes import processes

    weights = weights or weights_hash(network)
    device = processes().device
    network.to(device).eval()
    return Classifier(f"{name} (sha256 {weights[:12]})", tuple(labels), weights, preprocess, logits or network, device)


def classifier_judge(classifier: Classifier) -> LoadedJudge:
    """Return a classifier as a judge: an image shows its most probable class."""

    def judge(files: Sequence[Path]) -> Judgement:
        found = [np.zeros((0, len(classifier.labels)), np.float32)]
        for start in range(0, len(files), _AT_ONCE):
            images = [read_image(file) for file in files[start : start + _AT_ONCE]]
            same_size = (list(some) for _, some in groupby(images, lambda image: image.shape))
            found += [classifier.probabilities(np.stack(some)) for some in same_size]
        scores = np.concatenate(found)
        return Judgement(classifier.labels, scores, words=tuple(classifier.labels[at] for at in scores.argmax(1)))

    return LoadedJudge(classifier.name, classifier.labels, judge, weights=classifier.weights)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn a ValueError into a RequestError that names the judge."""
    try:
        yield
    except ValueError as problem:
        raise RequestError("judge", name, getattr(problem, "allowed", str(problem))) from problem


def imagenet_labels() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes, each of them once, as torchvision gives them."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def why_not(problem: Exception) -> str:
    """Say why a model of a hub did not load, and what to do where it is neither here nor to be had."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return "is neither a folder nor in the hub's cache, and could not be downloaded: load it once while online"
        cause = cause.__cause__
    return f"could not be loaded: {first_line(problem)}"


def shown_name(value: str) -> str:
    """Return a model's name without the path of a local folder, for a report may travel."""
    folder = Path(value.removeprefix("local-dir:"))
    return folder.resolve().name if folder.is_dir() else value


def first_line(problem: BaseException) -> str:
    """Return the first line of an error."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _last_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[-1]
