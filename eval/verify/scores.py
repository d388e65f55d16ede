"""Checks that a report's numbers follow from its manifests and from what the judges said, some of it judged anew."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.images import EvalImages
from erase_concept.eval.judgements import JUDGEMENTS, Judged, read_judgements
from erase_concept.eval.judges import find_judge
from erase_concept.eval.judges.judge import Judgement
from erase_concept.eval.measure import measure
from erase_concept.eval.plan import EvalPlan, make_plan
from erase_concept.eval.report.html import render
from erase_concept.eval.report.report import Report, drawn, read_report
from erase_concept.eval.report.verdict import summary
from erase_concept.eval.report.write import report_content
from erase_concept.eval.request import EvalRequest
from erase_concept.eval.verify.check import Check, failed
from erase_concept.files import file_sha256, relative
from erase_concept.pipelines.formats.modelspec import model_name
from erase_concept.pipelines.image_set import MANIFEST, SETTINGS, ImageSet, is_intact, read_images, read_manifest
from erase_concept.prompts.concept import parse
from erase_concept.prompts.promptset import PromptSet
from erase_concept.version import __version__

SAME = 1e-5  # numbers that differ by no more than this share are equal: networks may round otherwise elsewhere
JUDGED_ALIKE = 1e-3  # scores of an image that differ by no more are one judgement
REJUDGED = "judgements in "  # how a check of a random share of the images begins
_OF_PAGES = re.compile(rb"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]*")


@dataclass(frozen=True)
class Recheck:
    """Which images are judged anew: a share of them, drawn with a seed."""

    share: float
    seed: int


@dataclass(frozen=True, eq=False)
class CheckedReport:
    """A report that was checked: its file from the certificate's folder, and how many images were judged anew.

    ``files`` is the evidence: all that the numbers come from, and the pages that show them. ``counted`` says whether
    its numbers could be counted again.
    """

    name: str
    report: Report | None
    checks: tuple[Check, ...]
    rejudged: int = 0
    files: tuple[Path, ...] = ()
    counted: bool = False


@dataclass(frozen=True)
class Measured:
    """What a report should be of: a model and its base model, that one's name, and the hashes of their components.

    The hashes are by "erased" and "base", and by the names of the components.
    """

    model: Path
    base: str
    name: str
    hashes: Mapping[str, Mapping[str, str]]


def check_report(folder: Path, home: Path, measured: Measured, recheck: Recheck) -> CheckedReport:
    """Check the report in a folder. ``home`` is the certificate's folder.

    Raises RequestError where it cannot be checked here: a judge is not installed, or is another one.
    """
    name = relative(folder / "report.json", home)
    try:
        report = read_report(folder)
    except RequestError as problem:
        return CheckedReport(name, None, (failed(name, name, problem.allowed),))
    files = [folder / one for one in ("report.json", "report.md", "report.html", "grid.png")]
    files += [folder / one for one in report.provenance.get("evidence", {})]
    present = tuple(file for file in files if file.is_file())
    sides = [who for who in ("erased", "base") if getattr(report, who) is not None]
    checks = [*_unchanged(report, sides, folder, home), *_of_these(report, sides, measured, name)]
    if checks:
        return CheckedReport(name, report, tuple(checks), 0, present)
    if not all((folder / "samples" / who).is_dir() for who in sides):
        elsewhere = Check(f"numbers of {name}", None, "its images are not here, and its scores are left out")
        return CheckedReport(name, report, (elsewhere,), 0, present)
    images = {who: read_images(folder / "samples" / who) for who in sides}
    file = relative(folder / JUDGEMENTS, home)
    try:
        judged = read_judgements(folder, images)
    except RequestError as problem:
        return CheckedReport(name, report, (failed(file, file, problem.allowed),), 0, present)
    # Features from a cache beside the run would be the run's own claim; and nothing is to be left there.
    with TemporaryDirectory(prefix="erase-concept-", ignore_cleanup_errors=True) as empty:
        plan = _plan(report, images["erased"], Path(empty) / "report", measured)
        if strange := _strange(plan, judged):
            return CheckedReport(name, report, (failed(file, file, strange),), 0, present)
        again, rejudged = _judged_anew(plan, judged, recheck, file)
        checks = [_counted(report, plan, judged, folder, home), *_pages(report, folder, home), again]
    return CheckedReport(name, report, tuple(checks), rejudged, present, counted=True)


def _of_these(report: Report, sides: Sequence[str], measured: Measured, name: str) -> list[Check]:
    """Return a check that fails where the report is of other models."""
    what = f"models of {name}"
    for who in sides:
        for part, digest in measured.hashes[who].items():
            said = str(getattr(report, who).get(part, "(not said)"))
            if said != digest and "sampler" in getattr(report, who):
                return [failed(what, name, f"its {who} images are of the {part} {said[:16]}..., another one")]
    if _last(report.model) != _last(measured.name):
        return [failed(what, name, f"says that the base model is {model_name(report.model)}, not {measured.name}")]
    return []


def _last(source: str) -> str:
    """Return the last part of a model's name: whether the rest is a folder's, or a hub id's, depends on the machine."""
    return model_name(source).rpartition("/")[2]


def _unchanged(report: Report, sides: Sequence[str], folder: Path, home: Path) -> list[Check]:
    """Return what of the evidence is missing or was changed since the report was written."""
    what = f"evidence of {relative(folder / 'report.json', home)}"
    evidence = report.provenance.get("evidence")
    if not evidence:
        return [failed(what, relative(folder / "report.json", home), "names no evidence: evaluate again")]
    needed = [f"samples/{who}/{one}" for who in sides for one in (MANIFEST, SETTINGS)]
    needed = [JUDGEMENTS, *(one for one in needed if (folder / one).is_file())]
    if missing := next((one for one in needed if one not in evidence), ""):
        return [failed(what, relative(folder / "report.json", home), f"does not name {missing} among its evidence")]
    for name, digest in evidence.items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != digest:
            problem = "was changed since" if file.is_file() else "is missing"
            return [failed(what, relative(file, home), f"{problem}: the report was counted from another")]
    for manifest in (folder / name for name in evidence if name.endswith("manifest.jsonl")):
        for line in read_manifest(manifest.parent):
            if not is_intact(manifest.parent, line):
                return [
                    failed(what, relative(manifest.parent / line["image"], home), "is not the image of the manifest")
                ]
    return []


def _plan(report: Report, erased: ImageSet, out: Path, measured: Measured) -> EvalPlan:
    """Return the plan of the evaluation, from what the report says of it. Caches lie beside ``out``."""
    told = report.provenance["request"]
    request = EvalRequest(
        model=measured.model,
        out=out,
        concept=None if told["concept"] is None else parse(report.provenance["concept"]),
        benchmark=told["benchmark"],
        baseline=measured.base if report.base is not None else None,
        prompts=None if told["prompts"] is None else PromptSet(report.provenance["prompts"]["name"], erased.rows),
        judges=tuple(told["judges"]),
        metrics=tuple(told["metrics"]),
        settings=told["settings"],
        guard=told["guard"],
        fail_if=tuple(told["fail_if"]),
        first_seed=told["first_seed"],
    )
    plan = make_plan(request)
    for name, judge in plan.prepared.judges.items():
        there = report.provenance["judges"].get(name, {}).get("weights", judge.weights)
        if there != judge.weights:
            raise RequestError("judge", name, f"has other weights here ({judge.weights[:12]}) than then ({there[:12]})")
    return plan


def _strange(plan: EvalPlan, judged: Judged) -> str:
    """Say which judge of the plan has said nothing, or something of other labels; "" for none."""
    for name, judge in plan.prepared.judges.items():
        for who, side in judged.sides.items():
            if name not in side.judgements:
                return f"{name} has not judged the {who} images"
            if side.judgements[name].labels != tuple(judge.labels):
                return f"{name} judges the {who} images by other labels"
    return ""


def _counted(report: Report, plan: EvalPlan, judged: Judged, folder: Path, home: Path) -> Check:
    """Count all numbers again from what the judges said, and compare."""
    name = relative(folder / "report.json", home)
    base = None if judged.base is None else judged.base.images
    found = measure(plan, EvalImages(judged.erased.images, base, {}, 0.0), judged)
    again = report_content(replace(found, model=report.model), folder)  # the base model may be elsewhere here
    stated = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    again, stated = ({key: value for key, value in one.items() if key != "provenance"} for one in (again, stated))
    thresholds = report.provenance.get("thresholds", {})
    if place := differing(json.loads(json.dumps(again)), stated):
        return failed(f"numbers of {name}", name, f"{place} does not follow from the manifests and the judgements")
    numbers = f"{len(report.scores)} scores of {len(report.pairs):,} prompts and seeds"
    more = f", and {len(thresholds)} conditions" if thresholds else ""
    return Check(f"numbers of {name}", True, f"{numbers} follow from the manifests and the judgements{more}")


def differing(ours: Any, theirs: Any, place: str = "") -> str:
    """Return where two values of JSON differ by more than rounding; "" where nowhere."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return f"{place}.{min(ours.keys() ^ theirs.keys())}".lstrip(".")
        return next(
            (found for key in ours if (found := differing(ours[key], theirs[key], f"{place}.{key}".lstrip(".")))), ""
        )
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return place
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next((found for at, (a, b) in pairs if (found := differing(a, b, f"{place}[{at}]"))), "")
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (ours, theirs))
    same = math.isclose(ours, theirs, rel_tol=SAME, abs_tol=SAME * 0.1) if numbers else ours == theirs
    return "" if same else place


def _pages(report: Report, folder: Path, home: Path) -> list[Check]:
    """Check that the page and the Markdown say what report.json says; pictures in the page are not looked at."""
    from erase_concept.eval.report.markdown import markdown

    if report.provenance["versions"]["erase-concept"] != __version__:
        return [Check("report.html and report.md", None, "another version wrote them")]
    pairs = [report.pairs[place] for place in drawn(report.pairs)]
    page = render("report.html.j2", report=report, summary=summary(report), pairs=pairs)
    checks = []
    for name, content in (("report.html", page), ("report.md", markdown(report, pairs))):
        file = folder / name
        what = f"what {relative(file, home)} says"
        written = file.read_bytes() if file.is_file() else b""
        if _OF_PAGES.sub(b"", written) != _OF_PAGES.sub(b"", content):
            checks.append(failed(what, relative(file, home), "is not what report.json says"))
        else:
            checks.append(Check(what, True, "is what report.json says"))
    return checks


def _draw(images: ImageSet, recheck: Recheck) -> list[int]:
    """Return the places of the images that are judged anew: the share of them, one at least unless it is 0."""
    count = min(len(images.files), math.ceil(recheck.share * len(images.files)))
    return sorted(np.random.default_rng(recheck.seed).permutation(len(images.files))[:count].tolist())


def _judged_anew(plan: EvalPlan, judged: Judged, recheck: Recheck, name: str) -> tuple[Check, int]:
    """Let the judges judge some images anew, nothing of it from a cache, and compare; return also how many."""
    what = f"{REJUDGED}{name}"
    if not recheck.share:
        return Check(what, None, "no image was judged anew"), 0
    count = sum(len(_draw(side.images, recheck)) for side in judged.sides.values())
    for prepared_name, prepared in plan.prepared.judges.items():
        loaded = find_judge(prepared_name)[0].load(prepared.settings, None)
        for side in judged.sides.values():
            places = _draw(side.images, recheck)
            again = loaded.judge([side.images.files[place] for place in places])
            if wrong := _unlike(again, side.judgements[prepared_name], places):
                file = side.images.files[places[wrong[0]]]
                found = f"{prepared_name} judges {file.parent.name}/{file.name} otherwise: {wrong[1]}"
                return failed(what, name, found), count
    judges = ", ".join(plan.prepared.judges) or "no judge"
    share = f"{recheck.share:.0%} of the images, drawn with seed {recheck.seed}"
    return Check(what, True, f"{count:,} images judged anew ({share}) by {judges}: the same"), count


def _unlike(again: Judgement, stored: Judgement, places: Sequence[int]) -> tuple[int, str] | None:
    """Return the first image that is judged otherwise than before, by its place in ``again``, and how."""
    before = stored.scores[list(places)]
    close = np.isclose(again.scores, before, rtol=JUDGED_ALIKE, atol=JUDGED_ALIKE, equal_nan=True).all(1)
    for place in np.flatnonzero(~close):
        label = (
            int(np.nanargmax(np.abs(again.scores[place] - before[place]))) if np.isfinite(before[place]).any() else 0
        )
        return int(place), f"{stored.labels[label]} {again.scores[place][label]:.3f}, not {before[place][label]:.3f}"
    return None
