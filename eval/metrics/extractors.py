"""The networks in whose features images have distances: Inception, and every judge that has a network of features."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase_concept.errors import RequestError
from erase_concept.eval.features import Extractor
from erase_concept.eval.judges import JUDGES
from erase_concept.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterable

INCEPTION = "inception"
DEFAULT = "efficientnet-lite2"  # where Inception's weights are not to be had and no judge has features
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# The same file by the names that torch-fidelity and pytorch-fid give it in torch's cache.
_INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


def extractor(name: str, inception: Path | None = None) -> Extractor:
    """Return an extractor by name; ``inception`` is the file of Inception's weights, by default torch's cached one.

    Inception is torch-fidelity's and takes any size, by TensorFlow 1's resizing. Raises RequestError for another name,
    without the package or the weights that it needs, and for weights of Inception that are not those of 2015-12-05.
    """
    if name == INCEPTION:
        module = _inception(inception)
        return Extractor(name, "Inception (2015-12-05, torch-fidelity)", INCEPTION_SHA256, lambda x: module(x)[0])
    found = {judge.name: judge.extractor for judge in JUDGES.all().values() if judge.extractor is not None}
    if name not in found:
        raise RequestError("metric.extractor", name, f"no such extractor; allowed: {', '.join((INCEPTION, *found))}")
    return found[name]()


def choose_extractor(name: str | None, inception: Path | None, judges: Iterable[str]) -> tuple[Extractor, str]:
    """Return the extractor that is asked for, or the best of those that are here and why it is not Inception.

    The best is Inception, then the first of the ``judges`` that has features.
    """
    if name is not None or inception is not None:
        return extractor(name or INCEPTION, inception), ""
    try:
        return extractor(INCEPTION), ""
    except RequestError as problem:
        known = JUDGES.all()
        own = [judge for judge in judges if judge in known and known[judge].extractor is not None]
        return extractor(own[0] if own else DEFAULT), str(problem)


def _inception(file: Path | None) -> Any:
    """Return torch-fidelity's Inception with the weights that FID means, or raise RequestError."""
    from erase_concept.pipelines.processes import processes

    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError:
        needed = 'needs torch-fidelity: pip install "erase-concept[eval]"'
        raise RequestError("metric.extractor", "inception", needed) from None
    file = file or _cached_inception(URL_INCEPTION_V3)
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as problem:
        raise RequestError("metric.inception", file, str(problem.strerror)) from None
    if found != INCEPTION_SHA256:
        # Also why torch-fidelity may unpickle it: these bytes are known.
        wanted = f"is not {_INCEPTION_FILES[0]} (SHA-256 {INCEPTION_SHA256}), and no other weights give a FID"
        raise RequestError("metric.inception", file, wanted)
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)).to(
        processes().device
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
        "metric.inception", "(not given)", f"FID and KID need Inception's weights from {url}; {what}; {where}"
    )
