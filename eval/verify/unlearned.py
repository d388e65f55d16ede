"""Checks a classifier's run: its records, its weights against the first classifier's, and its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from erase_concept.classification.forget import read_rows
from erase_concept.classification.recipe import make_unlearn_recipe
from erase_concept.classification.run import RUN_FILE
from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.classification.evaluate import evaluate_classifier
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.exports import sorted_tensors
from erase_concept.eval.verify.findings import Findings, VerifyRequest
from erase_concept.eval.verify.run import check_files, check_mask, check_recipe
from erase_concept.eval.verify.scores import differing
from erase_concept.eval.verify.weights import Compared, compare
from erase_concept.files import read_json, relative
from erase_concept.pipelines.classifiers.load import classifier_state
from erase_concept.pipelines.formats.modelspec import model_name
from erase_concept.recipe import read_recipe
from erase_concept.run_folder import read_run

_RECORDS = (RUN_FILE, "recipe.yaml", "forget.txt", "mask.safetensors", "log.jsonl")
_WEIGHTS = "classifier/weights.safetensors"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's, which no mask freezes


def check_unlearned(request: VerifyRequest, base: str) -> Findings:
    """Check a classifier's run against the classifier that it began with.

    Raises RequestError when it has forgotten nothing, or ``base`` is not the classifier that it began with.
    """
    run = Path(request.model)
    info = read_run(run, RUN_FILE)
    if not info["images"]["forget"]:
        raise RequestError("run", run, "has forgotten nothing: it is an original")
    recipe = make_unlearn_recipe(read_recipe(run / "recipe.yaml"))
    checks = [check_recipe(info, recipe.fingerprint()), *check_files(run / "classifier", run, info)]
    checks += _forgotten(run / "forget.txt", info["images"]["forget"])
    mask, found = check_mask(run, info)
    checks += found
    compared = None
    try:
        first = sorted(classifier_state(base).items())
    except ValueError as problem:
        raise RequestError("base", base, getattr(problem, "allowed", str(problem))) from None
    try:
        compared = compare("classifier", first, sorted_tensors(run / _WEIGHTS), mask, uncounted=_STATISTICS)
    except (ValueError, OSError, SafetensorError) as problem:
        checks.append(failed("classifier", _WEIGHTS, str(problem)))
    else:
        checks.append(_check_weights(info, compared, base, masked=mask is not None))
    scores, measured, files = _scores(run, request)
    return Findings(
        about={
            "removed": {"images": info["forget"], "count": info["images"]["forget"]},
            "base": {"name": model_name(info["base"]["source"]), **info["base"]} | {"source": model_name(base)},
            "erased": info["unlearned"],
            "method": info["method"],
            "mask": info["mask"],
            "erased_with": info["versions"],
        },
        checks=(*checks, *measured),
        parts=() if compared is None else (compared,),
        scores=tuple(scores),
        subjects=tuple(file for file in (run / _WEIGHTS, run / "classifier" / "classifier.json") if file.is_file()),
        evidence=tuple(file for file in (*(run / name for name in _RECORDS), *files) if file.is_file()),
        untested=tuple(_untested(measured)),
    )


def _forgotten(file: Path, count: int) -> list[Check]:
    """Return a check that fails where a run's list of forgotten images has another number of them, or no numbers."""
    try:
        found = len(read_rows(file))
    except RequestError as problem:
        return [failed(file.name, file.name, f"is damaged: {problem.allowed}")]
    return [] if found == count else [failed(file.name, file.name, f"names {found} images, not {count}")]


def _check_weights(info: Mapping[str, Any], found: Compared, base: str, *, masked: bool) -> Check:
    if found.base != info["base"]["sha256"]:
        raise RequestError("base", base, "is not the classifier that this run began with")
    if found.broken:
        return failed("classifier", _WEIGHTS, f"{found.broken} holds NaN or infinity")
    if found.outside:
        return failed(
            "classifier", _WEIGHTS, f"{found.outside:,} weights outside the mask differ, first in {found.first}"
        )
    if found.erased != info["unlearned"]["sha256"]:
        return failed("classifier", RUN_FILE, "has another hash than that of the new weights")
    rest = "none outside the mask, bit for bit" if masked else "there is no mask"
    return Check(
        "classifier", True, f"{found.weights:,} weights, {found.changed:,} differ from the first one's, {rest}"
    )


def _scores(run: Path, request: VerifyRequest) -> tuple[list[dict[str, Any]], list[Check], list[Path]]:
    """Measure again what the run's reports say; the scores, the checks, and the files of the reports."""
    folders = [file.parent for file in sorted((run / "report.json", *run.glob("*/report.json"))) if file.is_file()]
    scores, checks, files = list[dict[str, Any]](), list[Check](), list[Path]()
    for folder in (*folders, *request.reports):
        file = folder / "report.json"
        name = relative(file, run)
        files += [folder / one for one in ("report.json", "report.md", "report.html")]
        try:
            stated = read_json(file)
            own = {key: stated[key] for key in ("method", "forget", "images", "seed")}
            values = [{key: score[key] for key in ("metric", "value", "n", "ci95")} for score in stated["scores"]]
            again = json.loads(json.dumps(asdict(evaluate_classifier(run))))
        except (OSError, ValueError, KeyError, TypeError, EraseError) as problem:
            if isinstance(problem, RequestError):
                checks.append(Check(f"numbers of {name}", None, f"cannot be measured here: {problem}"))
            else:
                checks.append(failed(f"numbers of {name}", name, f"is damaged: {problem}"))
            continue
        now = [{key: score[key] for key in ("metric", "value", "n", "ci95")} for score in again["scores"]]
        place = differing({"scores": now} | {key: again[key] for key in own}, {"scores": values} | own)
        if place:
            checks.append(failed(f"numbers of {name}", name, f"{place} is not what is measured now"))
        else:
            checks.append(
                Check(f"numbers of {name}", True, f"{len(now)} scores are what is measured now, of all images")
            )
        scores += [{"report": name, "benchmark": stated.get("data", ""), **score} for score in stated["scores"]]
    return scores, checks, files


def _untested(measured: list[Check]) -> Iterator[str]:
    yield "Attacks: whether the forgotten images can be won back, beyond the membership attacks of a report."
    yield "BatchNorm's running statistics are no weights: a mask does not freeze them, and they are not counted."
    if not measured:
        yield "Whether the images are forgotten: there is no report of a measurement."
    else:
        yield "Scores of a retrained classifier, which stand beside the run's as baselines, were not measured again."
    for check in measured:
        if check.holds is None:
            yield f"{check.what}: {check.found}."
