"""Checks a classifier's run: its records, its weights against the first classifier's, and its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError

from erase_concept.classification.forget import read_rows
from erase_concept.classification.mask import ClassifierMask
from erase_concept.classification.recipe import UnlearnRecipe, make_unlearn_recipe
from erase_concept.classification.run import RUN_FILE
from erase_concept.errors import EraseError, RequestError
from erase_concept.eval.classification.evaluate import ClassifierReport, evaluate_classifier
from erase_concept.eval.classification.report import markdown
from erase_concept.eval.report.html import render
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.exports import sorted_tensors
from erase_concept.eval.verify.findings import Findings, VerifyRequest
from erase_concept.eval.verify.log import LOG, check_log
from erase_concept.eval.verify.mask import MASK, check_mask
from erase_concept.eval.verify.run import check_files, check_recipe
from erase_concept.eval.verify.scores import differing
from erase_concept.eval.verify.weights import Compared, compare
from erase_concept.files import read_json, relative
from erase_concept.masks.choose import MASK_KINDS
from erase_concept.masks.mask import Mask
from erase_concept.masks.top_k import keep_count
from erase_concept.pipelines.classifiers.load import classifier_state
from erase_concept.pipelines.formats.modelspec import model_name
from erase_concept.recipe import read_recipe
from erase_concept.run_folder import read_run
from erase_concept.version import __version__

_RECORDS = (RUN_FILE, "recipe.yaml", "forget.txt", "mask.safetensors", LOG)
_WEIGHTS = "classifier/weights.safetensors"
_OF_RECIPE = ("method", "forget", "seed")
_OF_SCORE = ("metric", "target", "value", "n", "ci95", "unit", "protocol")
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
    checks += _said(info, recipe)
    checks += [*_forgotten(run / "forget.txt", info["images"]["forget"]), check_log(run)]
    mask, found = check_mask(run, info)
    checks += found
    if mask is not None and found[-1].holds is not False and (fault := _mask_fault(mask, recipe.mask)):
        checks.append(failed(MASK, MASK, fault))
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
        checks.append(_check_weights(info, compared, base, mask))
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


def _said(info: Mapping[str, Any], recipe: UnlearnRecipe) -> list[Check]:
    """Return checks that fail where the run's record says something else than its recipe."""
    mask = info["mask"] and info["mask"]["kind"]
    noted = {"mask": mask or "none", "base": model_name(info["base"]["source"])} | {
        key: info[key] for key in _OF_RECIPE
    }
    said = {"mask": recipe.mask.kind, "base": model_name(recipe.classifier)} | {
        key: getattr(recipe, key) for key in _OF_RECIPE
    }
    return [
        failed(RUN_FILE, RUN_FILE, f"says {key} {noted[key]}, the recipe says {said[key]}")
        for key in said
        if noted[key] != said[key]
    ]


def _mask_fault(mask: Mask, asked: ClassifierMask) -> str:
    """Say what of a mask is not as the recipe asks; "" where all is. A file's may let any number of weights change."""
    wanted = keep_count(1 - asked.sparsity, mask.total)
    if asked.kind not in MASK_KINDS or mask.count == wanted:
        return ""
    return f"lets {mask.count:,} weights change; by the recipe's sparsity {asked.sparsity:g} they are {wanted:,}"


def _forgotten(file: Path, count: int) -> list[Check]:
    """Return a check that fails where a run's list of forgotten images has another number of them, or no numbers."""
    try:
        found = len(read_rows(file))
    except RequestError as problem:
        return [failed(file.name, file.name, f"is damaged: {problem.allowed}")]
    return [] if found == count else [failed(file.name, file.name, f"names {found} images, not {count}")]


def _check_weights(info: Mapping[str, Any], found: Compared, base: str, mask: Mask | None) -> Check:
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
    if mask is not None and mask.total != found.weights:
        return failed(MASK, MASK, f"is for {mask.total:,} weights, and the classifier has {found.weights:,}")
    for key, value in (("weights", found.weights), ("changed", found.changed)):
        if info["checks"][key] != value:
            return failed("classifier", RUN_FILE, f"says {info['checks'][key]:,} for {key}, there are {value:,}")
    rest = "there is no mask" if mask is None else "none outside the mask, bit for bit"
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
            values = [{key: score[key] for key in _OF_SCORE} for score in stated["scores"]]
            checks += _pages(folder, run, stated)
            again = json.loads(json.dumps(asdict(evaluate_classifier(run))))
        except (OSError, ValueError, KeyError, TypeError, EraseError) as problem:
            if isinstance(problem, RequestError):
                checks.append(Check(f"numbers of {name}", None, f"cannot be measured here: {problem}"))
            else:
                checks.append(failed(f"numbers of {name}", name, f"is damaged: {problem}"))
            continue
        now = [{key: score[key] for key in _OF_SCORE} for score in again["scores"]]
        place = differing({"scores": now} | {key: again[key] for key in own}, {"scores": values} | own)
        if place:
            checks.append(failed(f"numbers of {name}", name, f"{place} is not what is measured now"))
        else:
            checks.append(
                Check(f"numbers of {name}", True, f"{len(now)} scores are what is measured now, of all images")
            )
        scores += [{"report": name, "benchmark": stated.get("data", ""), **score} for score in stated["scores"]]
    return scores, checks, files


def _pages(folder: Path, run: Path, stated: Mapping[str, Any]) -> Iterator[Check]:
    """Check that the page and the Markdown say what report.json says, where this version wrote the run."""
    what = f"pages of {relative(folder / 'report.json', run)}"
    if read_run(run, RUN_FILE)["versions"]["erase-concept"] != __version__:
        yield Check(what, None, "another version wrote them")
        return
    report = TypeAdapter(ClassifierReport).validate_python({k: v for k, v in stated.items() if k != "schema"})
    pages = {"report.md": markdown(report).encode(), "report.html": render("classifier.html.j2", report=report)}
    for name, content in pages.items():
        file = folder / name
        if not file.is_file() or file.read_bytes() != content:
            yield failed(what, relative(file, run), "is not what report.json says")
            return
    yield Check(what, True, "say what report.json says")


def _untested(measured: list[Check]) -> Iterator[str]:
    yield "Attacks: whether the forgotten images can be won back, beyond the membership attacks of a report."
    yield "The recipe: it was not run again. That it and a mask's saliency led to these weights is the run's own claim."
    yield "The names of the classes and the images' normalisation were not compared with the first classifier's."
    yield "BatchNorm's running statistics are no weights: a mask does not freeze them, and they are not counted."
    if not measured:
        yield "Whether the images are forgotten: there is no report of a measurement."
    else:
        yield "Scores of a retrained classifier, which stand beside the run's as baselines, were not measured again."
    for check in measured:
        if check.holds is None:
            yield f"{check.what}: {check.found}."
