"""A classifier's run is verified: its records, its weights against the first classifier's, and its scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import erase_concept as ec
from erase_concept.classification.run import UnlearnRun
from erase_concept.errors import RequestError
from erase_concept.eval.classification.evaluate import evaluate_classifier
from erase_concept.eval.classification.report import write_classifier_report
from erase_concept.eval.verify.verify import verify
from erase_concept.files import file_sha256
from erase_concept.masks.mask import Mask, all_ones

ARCHITECTURE = "resnet18-cifar[width=2,stride=2]"
WEIGHTS = "classifier/weights.safetensors"


@pytest.fixture(scope="module")
def made(fashion: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier, a run that forgot a tenth of its images, and the run's report."""
    folder = tmp_path_factory.mktemp("verified")
    data = {"source": fashion, "train": 100, "test": 50, "crop": 1}
    training = {"epochs": 1, "batch_size": 32}
    ec.train_classifier(ARCHITECTURE, data=data, out=folder / "original", settings=training, seed=4)
    run = ec.unlearn(
        folder / "original",
        data={"source": fashion},
        forget="random:10%",
        out=folder / "run",
        settings=training,
        seed=4,
    )
    write_classifier_report(evaluate_classifier(run), run.path)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def faults() -> list[str]:
    return [one.file for one in verify("run", base="original").checks if one.holds is False]


def edit(change: Callable[[dict[str, Any]], None], file: str = "run/unlearn.json") -> None:
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))


def test_a_run_holds_and_gets_a_certificate(folder: Path) -> None:
    done = verify("run", base="original")
    assert not [one for one in done.checks if not one.holds]
    said = json.loads(Path("run/certificate.json").read_text())["predicate"]
    info = json.loads(Path("run/unlearn.json").read_text())
    (compared,) = said["components"]
    assert (compared["base"], compared["erased"]) == (info["base"]["sha256"], info["unlearned"]["sha256"])
    assert (compared["changed"], compared["outside"]) == (info["checks"]["changed"], 0)
    assert {one["metric"] for one in said["scores"]} == {"ua", "ra", "ta", "mia", "mia_loss"}
    assert Path("run/certificate.html").is_file()
    assert verify("run/certificate.json").holds


@pytest.mark.parametrize("method", ["ssd", "influence", "boundary-expand", "scrub", "retrain"])
def test_the_log_of_each_kind_of_method_is_whole(method: str, folder: Path, fashion: str) -> None:
    """One step, an additional class, epochs of several parts, and new weights."""
    settings: dict[str, Any] = {"batch_size": 32} | ({} if method in ("ssd", "influence") else {"epochs": 2})
    ec.unlearn("original", data={"source": fashion}, forget="random:10%", out="own", method=method, settings=settings)
    found = {one.what: one for one in verify("own", base="original").checks}
    assert found["log.jsonl"].holds, found["log.jsonl"].found


def outside() -> None:
    """Move one weight outside the mask by one bit, and mend both hashes."""
    mask = Mask.load(Path("run/mask.safetensors"))
    name = next(name for name in mask.bits if not mask.dense(name).all())
    place = int((~mask.dense(name)).flatten().nonzero()[0])
    tensors = load_file(f"run/{WEIGHTS}")
    tensors[name].view(torch.int32).view(-1)[place] ^= 1
    save_file(tensors, f"run/{WEIGHTS}")
    edit(lambda info: info["files"].update({"weights.safetensors": file_sha256(Path("run") / WEIGHTS)}))


def every_weight() -> None:
    """Let every weight change, and mend what is noted of the mask."""
    mask = all_ones(Mask.load(Path("run/mask.safetensors")).shapes)
    mask.save(Path("run/mask.safetensors"))
    edit(lambda info: info["mask"].update(sha256=mask.sha256(), density=mask.density))


def cut_log() -> None:
    log = Path("run/log.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("tamper", "file"),
    [
        (outside, WEIGHTS),
        (lambda: edit(lambda info: info["unlearned"].update(sha256="0")), "unlearn.json"),
        (lambda: Path("run/forget.txt").write_text("1\n"), "forget.txt"),
        (lambda: Path("run/forget.txt").write_bytes(b"\xff"), "forget.txt"),
        (lambda: Path("run/report.json").write_text("[" * 100_000), "report.json"),
        (lambda: edit(lambda report: report["scores"][0].update(value=0.3), "run/report.json"), "report.json"),
        (lambda: Path("run/mask.safetensors").write_bytes(b"no mask"), "mask.safetensors"),
        (lambda: edit(lambda info: info.update(mask=None)), "unlearn.json"),
        (lambda: edit(lambda info: info.update(method="retrain", forget="class:dog")), "unlearn.json"),
        (lambda: Path("run/report.html").write_text("all is forgotten"), "report.html"),
        (every_weight, "mask.safetensors"),
        (cut_log, "log.jsonl"),
    ],
    ids=[
        "a weight outside the mask",
        "a hash",
        "the images",
        "no images",
        "a deep report",
        "a score",
        "the mask",
        "no mask",
        "the method",
        "the page",
        "a mask of all weights",
        "a log that was cut",
    ],
)
def test_what_was_tampered_with_is_named(tamper: Callable[[], None], file: str, folder: Path) -> None:
    tamper()
    assert file in faults()
    assert not Path("run/certificate.json").exists()


def test_a_damaged_record_is_refused_by_those_who_measure(folder: Path) -> None:
    Path("run/forget.txt").write_text("one\n")
    with pytest.raises(RequestError, match=r"forget indices:run/forget\.txt: line 1 is 'one'"):
        evaluate_classifier("run")
    with pytest.raises(RequestError, match=r"forget indices:run/forget\.txt: line 1 is 'one'"):
        UnlearnRun(Path("run")).forgotten.tolist()
    edit(lambda info: info.pop("seconds"))
    with pytest.raises(RequestError, match=r"unlearn\.json is damaged: seconds is missing or wrong"):
        evaluate_classifier("run")


def test_another_classifier_and_an_original_are_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="is not the classifier that this run began with"):
        verify("run", base="run")
    with pytest.raises(RequestError, match="has forgotten nothing"):
        verify("original", base="original")
