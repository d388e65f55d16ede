"""What a run leaves and others read: checkpoints, a classifier's run, judgements, and signed certificates.

For each a valid one, which the readers of ``readers.py`` begin with, and how it is read.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis.strategies import SearchStrategy
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from erase_concept.classification.data import Split
from erase_concept.classification.forget import forget_rows
from erase_concept.classification.run import UnlearnRun
from erase_concept.errors import RequestError, one_line
from erase_concept.eval.judgements import JUDGEMENTS, Judged, read_judgements, save_judgements
from erase_concept.eval.judges.judge import Detection, Judgement
from erase_concept.eval.metrics.metric import JudgedImages
from erase_concept.eval.metrics.nudity import count_table
from erase_concept.eval.verify.certificate import (
    PREDICATE,
    STATEMENT,
    Certificate,
    check_again,
    check_certificate,
    write_certificate,
)
from erase_concept.eval.verify.exports import _check_metadata, export_format
from erase_concept.eval.verify.signature import PAYLOAD_TYPE, check_envelope, envelope, key_id
from erase_concept.eval.verify.verify import verify
from erase_concept.files import file_sha256
from erase_concept.masks.mask import all_ones
from erase_concept.pipelines.classifiers.architectures import build
from erase_concept.pipelines.classifiers.classifier import Classifier, Normalisation
from erase_concept.pipelines.classifiers.images import ImageData, InMemory
from erase_concept.pipelines.image_set import MANIFEST, ImageSet, manifest_line
from erase_concept.prompts.promptset import PromptRow
from erase_concept.run_folder import versions
from erase_concept.run_log import checkpoint_file, logged, logged_losses
from erase_concept.training.checkpoint import _sha256, restore, save_checkpoint, steps_done, steps_in
from erase_concept.training.loop import Record
from erase_concept.training.optimizer import MaskedOptimizer
from erase_concept.training.rules import Adam

# Checkpoints, and the log that belongs to them.
CHECKPOINT = {
    "metadata": {"step": "3", "sha256": "0"},
    "tensors": {
        "step": ["I64", [], 8], "weights.weight": ["F32", [1, 2], 8], "weights.bias": ["F32", [1], 4],
        "mean.weight": ["F32", [2], 8], "mean.bias": ["F32", [1], 4],
        "square.weight": ["F32", [2], 8], "square.bias": ["F32", [1], 4],
    },
}  # fmt: skip


def _optimizer() -> MaskedOptimizer:
    """Return the optimizer of a training of four steps, after the first of them."""
    module = torch.nn.Linear(2, 1)
    optimizer = MaskedOptimizer(module, None, Adam(1e-3))
    module(torch.ones(2)).backward()
    optimizer.step()
    return optimizer


def checkpoint_seeds(folder: Path) -> list[bytes]:
    """Return a checkpoint, and lay the one of before beside it."""
    file = folder / "last.safetensors"
    for step in (2, 3):
        save_checkpoint(file, _optimizer().state(), step)
    return [file.read_bytes()]


def with_checksum(content: bytes) -> bytes:
    """Return a checkpoint with the checksum of what it holds, where it holds anything, so that it is read further."""
    try:
        tensors = load(content)
        return save(tensors, {"step": "3", "sha256": _sha256(tensors, 3)})
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        return content


class _OneLine(logging.Handler):
    """Fails for a warning that a terminal would obey."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        assert one_line(text) == text, f"warns in no plain line: {text!r}"


def read_newest(file: Path) -> object:
    """Read a checkpoint as a training does that goes on."""
    logger, handler = logging.getLogger("erase_concept"), _OneLine()
    logger.addHandler(handler)
    try:
        steps_in(file.parent)
        return restore(_optimizer(), file) if steps_done(file) else None
    finally:
        logger.removeHandler(handler)


RECORD = asdict(Record(1, 4, 0.5, {"forget": 0.25, "retain": 0.25}, 1e-5, 2.0))


def log_seeds(folder: Path) -> list[bytes]:
    """Return a log of three steps, and lay their checkpoint beside it."""
    checkpoint_file(folder).parent.mkdir(exist_ok=True)
    save_checkpoint(checkpoint_file(folder), _optimizer().state(), 3)
    return [b"".join(json.dumps(RECORD | {"step": step}).encode() + b"\n" for step in (1, 2, 3))]


def read_log(file: Path) -> object:
    """Read a log as a run does that goes on, and go on by one step."""
    return logged_losses(file.parent), list(logged(file.parent, iter([Record(**RECORD)])))


# A classifier's run.
ARCHITECTURE = "resnet18-cifar[width=2]"
UNLEARNED = {"classifier": "first", "forget": "random:1", "method": "salun", "data": {"source": "folder:x"}}


def _first() -> Classifier:
    network = build(ARCHITECTURE, 2, 3, 0)
    return Classifier(ARCHITECTURE, network, ("a", "b"), Normalisation((0.5,) * 3, (0.5,) * 3), 8, "", {})


UNLEARN_INFO: dict[str, Any] = {
    "schema": 1,
    "method": "salun",
    "forget": "random:1",
    "images": {"forget": 1, "retain": 3},
    "seed": 0,
    "recipe": "0",
    "settings": {"lr": 0.1},
    "base": {"source": "first", "architecture": ARCHITECTURE, "sha256": _first().sha256()},
    "unlearned": {"sha256": "1"},
    "mask": {"kind": "salient", "sha256": "2", "density": 1.0},
    "checks": {"weights": 9},
    "seconds": {"mask": 0.1, "unlearn": 0.2},
    "resumed_at_step": 0,
    "versions": {"torch": "2"},
    "files": {"a": "0"},
}


def unlearned_seeds(folder: Path) -> list[bytes]:
    """Lay a classifier's run into a folder, with the classifier that it began with."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(UNLEARNED))
    (folder / "forget.txt").write_text("2\n")
    all_ones({"conv1.weight": (2, 3, 3, 3)}).save(folder / "mask.safetensors")
    for name in ("classifier", "first"):
        _first().save(folder / name)
    return [json.dumps(UNLEARN_INFO).encode()]


def list_seeds(folder: Path) -> list[bytes]:
    """Lay the same, and return its list of forgotten images."""
    (content,) = unlearned_seeds(folder)
    (folder / "unlearn.json").write_bytes(content)
    return [b"2\n"]


def read_unlearned(file: Path) -> object:
    """Read a classifier's run, and verify it."""
    for written in file.parent.glob("certificate.*"):
        written.unlink()
    found = UnlearnRun(file.parent).run_info
    verify(file.parent, base=str(file.parent / "first"))
    return sum(found["seconds"].values()), found["base"]["source"], found["images"]["forget"], found["unlearned"]


def read_indices(file: Path) -> object:
    """Read a list of images that are to be forgotten, of the three that a split has."""
    images, labels = InMemory(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), torch.zeros(4, dtype=torch.int64)
    data = ImageData("d", images, labels, images, labels, ("a",))
    rows = torch.arange(3)
    return forget_rows(f"indices:{file}", Split(data, rows, rows[:0], rows), 0)


# Judgements.
def _images(folder: Path) -> ImageSet:
    files = []
    for place in range(2):
        files.append(folder / f"{place}.png")
        if not files[-1].is_file():
            Image.new("RGB", (8, 8), (place, 9, 9)).save(files[-1])
    return ImageSet(tuple(files), (PromptRow("a", 0), PromptRow("b", 1)), {})


def _about(folder: Path) -> dict[str, Any]:
    said = {"labels": ["x", "y"], "kinds": ["object", "object"], "threshold": None, "words": ["x", "y"]}
    said |= {"detections": [[["FACE_MALE", 0.5]], None]}
    return {"erased": {"images": [file_sha256(file) for file in _images(folder).files], "judges": {"j": said}}}


def judgement_seeds(folder: Path) -> list[bytes]:
    """Return what two judges said of two images."""
    images, numbers = _images(folder), np.array([[0.1, 0.9], [np.nan, 0.5]], np.float32)
    found = (Detection("FACE_MALE", 0.5),), None
    judged = {
        "net": Judgement(("x", "y"), numbers, ("object", "style"), words=("y", "x"), features=numbers),
        "nudenet": Judgement(
            ("nudity",), numbers[:, :1], ("nudity",), 0.3, flagged=numbers[:, 0] > 0, detections=found
        ),
    }
    save_judgements(Judged(JudgedImages(images, judged), None), folder)
    return [(folder / JUDGEMENTS).read_bytes(), judgements_of(json.dumps(SAID))]


def judgements_of(about: str) -> bytes:
    """Return a file of judgements that says this, in JSON, of scores [2, 2] of a judge ``j``."""
    told = torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)
    return save({"about": told, "erased/j/scores": torch.rand(2, 2)}, {"format": "erase-concept judgements 1"})


def judgements_that_say(documents: SearchStrategy[Any]) -> SearchStrategy[bytes]:
    """Return files of judgements that say these."""
    return documents.map(lambda value: judgements_of(json.dumps(value)))


def read_said(file: Path) -> object:
    """Read judgements, and count what they say."""
    side = read_judgements(file.parent, {"erased": _images(file.parent)}).erased
    counted = []
    for one in side.judgements.values():
        counted += [one.shown(kind) for kind in {*one.kinds}]
        counted.append(one.where(np.array([True, False])).scores)
        if one.detections:
            counted.append(count_table(one.detections, None, 0.6, "papers"))
    return counted


# Certificates.
@cache
def _key() -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def statement_of(folder: Path) -> dict[str, Any]:
    """Return a statement of an erasure, and lay into a folder what it certifies."""
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    image = _images(folder).files[0]
    (folder / MANIFEST).write_text(manifest_line(image, PromptRow("a", 0)))
    score = {"report": "report.json", "benchmark": "b", "metric": "ua", "target": "x", "value": 0.9, "n": 10}
    score |= {"ci95": [0.7, 1.0], "unit": "fraction", "protocol": "p", "baseline": 0.1, "baseline_ci95": [0.0, 0.3]}
    part = {
        "part": "unet",
        "weights": 9,
        "changed": 3,
        "outside": 0,
        "first": "",
        "broken": "",
        "base": "",
        "erased": "",
    }

    def described(name: str) -> dict[str, Any]:
        return {"name": name, "digest": {"sha256": file_sha256(folder / name)}}

    about = {
        "removed": {"concept": "x", "kind": "object"},
        "base": {"name": "m", "unet_sha256": "0"},
        "method": "salun",
    }
    about |= {"mask": {"kind": "salient", "density": 0.5}, "recipe": {"model": "m"}, "erased_with": {"torch": "2"}}
    return {
        "_type": STATEMENT,
        "subject": [described("model.safetensors")],
        "predicateType": PREDICATE,
        "predicate": {
            "about": about,
            "components": [part],
            "checks": [{"what": "unet", "holds": True, "found": "f", "file": ""}],
            "scores": [score],
            "not_tested": ["Attacks."],
            "evidence": [described(MANIFEST)],
            "verified": "2026-01-01T00:00:00+00:00",
            "verifier": versions(),
        },
    }


def certificate_seeds(folder: Path) -> list[bytes]:
    """Return a certificate, and lay its page beside it."""
    where = Certificate(folder / "certificate.json")
    write_certificate(statement_of(folder), where)
    return [where.file.read_bytes()]


def read_certified(file: Path) -> object:
    """Check a certificate, its files and its page, as its holder does and as another verification does."""
    where = Certificate(file)
    return [check_certificate(where, None, whole=whole) for whole in (True, False)], check_again(
        where, {"predicate": {"about": {}, "components": [], "scores": []}}
    )


def page_of(file: Path) -> str:
    """Return the page of a statement; raises RequestError for one that cannot be shown, as its check says."""
    from jinja2 import TemplateError

    from erase_concept.eval.verify.certificate import page, read_certificate

    try:
        return page(read_certificate(file)).decode()
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        raise RequestError("model", file, "cannot be shown") from None


ENVELOPE = {"payloadType": PAYLOAD_TYPE, "payload": "e30=", "signatures": [{"keyid": "", "sig": "AA=="}]}


def envelope_seeds(folder: Path) -> list[bytes]:
    """Return a signed envelope."""
    return [json.dumps(envelope(b"{}", _key(), Path("none"))).encode()]


def read_envelope(file: Path) -> object:
    """Check a signature."""
    public = _key().public_key()
    return check_envelope(file, b"{}", public), key_id(public)


KEY = (
    "-----BEGIN PUBLIC KEY-----",
    "MCowBQYDK2VwAyEAO2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik=",
    "-----END PUBLIC KEY-----",
)


def read_export(file: Path) -> object:
    """Tell an export's format, and check what it says of itself."""
    try:
        return export_format(file), _check_metadata(file, None)
    except (ValueError, SafetensorError):  # what ``verify`` says of such an export
        raise RequestError("model", file, "does not load") from None


with tempfile.TemporaryDirectory() as _folder:
    SAID, CERTIFIED = _about(Path(_folder)), statement_of(Path(_folder))
