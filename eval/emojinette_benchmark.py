"""The benchmark of Emojinette: its prompts, and UA, IRA, CRA and the Fréchet distance by its own classifier."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.images import Asked, Gathered, Plan, check_same, folder_of, is_images, sampling
from erase_concept.eval.measuring import option
from erase_concept.eval.metrics.accuracy import (
    LABELS,
    SIZE,
    Classified,
    classify,
    cross_domain_retain_accuracy,
    forget_mask,
    in_domain_retain_accuracy,
    per_concept,
    unlearning_accuracy,
)
from erase_concept.eval.metrics.fidelity import frechet, frechet_imagenet
from erase_concept.eval.report.report import Bar, Chart, Pair, Report
from erase_concept.eval.score import Score, wilson
from erase_concept.eval.thresholds import gates
from erase_concept.pipelines.builtin import catalogs_of
from erase_concept.pipelines.emojinette import CATALOG, CLASSIFIER, REFERENCE
from erase_concept.prompts.concept import Concept, parse
from erase_concept.prompts.find import find_concept
from erase_concept.prompts.label_grid import asks_for, check_labels, concept_prompts, object_rows
from erase_concept.prompts.promptset import PromptRow, PromptSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.pipelines.image_set import ImageSet

GUIDANCE = 5.0
METRICS: dict[str, Callable[[Classified, Concept], Score | None]] = {
    "ua": unlearning_accuracy,
    "ira": in_domain_retain_accuracy,
    "cra": cross_domain_retain_accuracy,
    "frechet": frechet,
    "frechet_imagenet": frechet_imagenet,
}
_KNOWN: dict[str, tuple[str, ...]] = {"object": CATALOG.labels, "style": CATALOG.styles}


def emojinette_benchmark(
    concept: Concept, seeds: int = 2, first_seed: int = 10_000, earlier: Sequence[Concept] = ()
) -> PromptSet:
    """Return the rows that ask Emojinette for the concept and for everything else, as ``concept_prompts`` does."""
    return concept_prompts(CATALOG, concept, seeds, first_seed, earlier, GUIDANCE)


def _asks_for_any(rows: Sequence[PromptRow], some: Sequence[Concept]) -> NDArray[np.bool_]:
    """Return which rows [n] ask for any of some concepts."""
    return np.array([any(asks_for(row, one) for one in some) for row in rows], dtype=bool)


def imagenette_stand_ins() -> PromptSet:
    """Return ten rows for each of the objects that stand in for Imagenette's classes."""
    rows = [row for label in CATALOG.labels[:10] for row in object_rows(CATALOG, label, 10)]
    rows = [replace(row, seed=30_000 + place, guidance=GUIDANCE) for place, row in enumerate(rows)]
    return PromptSet("imagenette, as Emojinette draws it", tuple(rows))


def asked(
    plan: Plan,
    concept: str | Concept | None,
    given: Mapping[str, Any],
    first_seed: int,
    metrics: Sequence[str],
) -> Asked:
    """Return what the benchmark asks for, whose prompts are made for the concept, and how it measures the metrics.

    A manifest with labels in it says itself what the images were asked for, be it something else. Raises RequestError
    when there is no concept, or a setting is given that the benchmark does not have.
    """
    if concept is None:
        raise RequestError("--concept", "(not given)", f"needed, for {plan.model} is no run folder")
    target = find_concept(concept, catalogs_of("emojinette"))
    earlier, left = _earlier(plan.run, target)
    prompts = emojinette_benchmark(target, given.get("seeds", 2), first_seed, earlier)
    options = {key: value for key, value in given.items() if key != "seeds"}
    if unused := sorted(options.keys() - {"steps", "scheduler"}):
        raise RequestError(option(unused[0]), options[unused[0]], "the benchmark emojinette has no such setting")
    checked = gates(plan.fail_if, tuple(metrics), baseline=plan.baseline is not None)
    if is_images(Path(plan.model)):
        prompts = _told(Path(plan.model), prompts)

    def measure(images: Gathered) -> Report:
        about: dict[str, Any] = {"run": plan.run} if plan.run else {}
        if notes := images.notes:
            about["notes"] = notes
        if left:
            about["erased earlier, not measured"] = left
        return evaluate(
            target,
            images.erased,
            images.base,
            model=plan.source,
            provenance=about,
            metrics=metrics,
            earlier=earlier,
        )

    return Asked(prompts, options, plan.guarded(target), checked, measure, size=SIZE)


def _earlier(run: Mapping[str, Any], concept: Concept) -> tuple[list[Concept], list[str]]:
    """Return what was erased from a run's model before, but for the concept itself, and what of it is not Emojinette's.

    Each comes once, however often it was erased.
    """
    parts = {part.name: part for entry in run.get("earlier", ()) for part in parse(entry["concept"]).parts}
    parts = {name: part for name, part in parts.items() if name not in concept.names}
    known = [part for part in parts.values() if part.name in _KNOWN.get(part.kind, ())]
    return known, [name for name, part in parts.items() if part not in known]


def _told(folder: Path, prompts: PromptSet) -> PromptSet:
    """Return what a folder's images were asked for: what its manifest says with labels, otherwise the prompts."""
    from erase_concept.pipelines.image_set import read_images

    if (folder / "manifest.jsonl").is_file():
        rows = read_images(folder).rows
        if any(row.object or row.style for row in rows):
            return PromptSet(prompts.name, rows)
    return prompts


def evaluate(
    concept: Concept,
    erased: ImageSet,
    base: ImageSet | None = None,
    *,
    model: str = "emojinette",
    provenance: Mapping[str, Any] | None = None,
    metrics: Sequence[str] = tuple(METRICS),
    earlier: Sequence[Concept] = (),
) -> Report:
    """Run metrics on the erased model's images and, on the same prompts and seeds, on the base model's.

    Of several concepts, the score of everything together is followed by the UA of each. ``earlier`` are concepts that
    the base model had lost already: their UA, too, is measured wherever they are asked for, and nothing else of them.
    ``model`` names the base model in the report and ``provenance`` (anything JSON can hold) ends it. Raises
    RequestError when the concept is unknown, when the two sets differ in more than the model, or when there is nothing
    to judge.
    """
    for one in (concept, *earlier):
        check_labels(CATALOG, one)
    if base is not None:
        check_same(erased, base)
    forget = forget_mask(erased.rows, concept)
    if not forget.any() or forget.all():
        what = concept.name if concept.combined else f"the {concept.kind} {concept.name!r}"
        missing = "asks for anything else" if forget.any() else f"asks for {what}"
        raise RequestError("DIR", folder_of(erased), f"no image {missing}; sample the benchmark of this concept")
    seen_base = None if base is None else _classify(base)
    seen = replace(_classify(erased), base=seen_base)
    # What was erased earlier is no part of what was to stay; the model that it was erased from last lacks it as well.
    rest = seen.where(~_asks_for_any(erased.rows, earlier)) if earlier else seen
    asked_before = [one for one in earlier if forget_mask(erased.rows, one).any()]
    try:
        found_scores = []
        for name in metrics:
            found_scores.append(_score(name, seen if name == "ua" else rest, concept, erased.settings))
            if name == "ua":
                found_scores += [_score(name, seen, part, erased.settings) for part in concept.combined]
                found_scores += [_score(name, seen, one, erased.settings, "erased earlier; ") for one in asked_before]
    except ValueError as problem:
        raise RequestError("DIR", folder_of(erased), str(problem)) from problem
    erased_labels = {(part.kind, part.name) for one in (concept, *earlier) for part in one.parts}
    found, found_base = per_concept(seen), None if seen_base is None else per_concept(seen_base)
    return Report(
        concept=concept.name,
        kind=concept.kind,
        anchor=concept.replacement,
        model=model,
        benchmark="emojinette",
        erased={"images": len(erased.rows), **erased.settings},
        base=None if base is None else {"images": len(base.rows), **base.settings},
        scores=tuple(score for score in found_scores if score is not None),
        charts=tuple(
            Chart(
                f"{kind.capitalize()}s recognised",
                "fraction",
                tuple(
                    _bar(
                        label,
                        found[kind][label],
                        None if found_base is None else found_base[kind][label],
                        forget=(kind, label) in erased_labels,
                    )
                    for label in labels
                    if found[kind][label][1]
                ),
            )
            for kind, labels in LABELS.items()
        ),
        pairs=tuple(
            _pair(place, erased, base, seen, seen_base, forget=bool(forget[place])) for place in range(len(forget))
        ),
        provenance={
            **(provenance or {}),
            "evaluated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "concept": concept.to_dict(),
            **({"erased earlier": [one.name for one in earlier]} if earlier else {}),
            "classifier": _sha256(CLASSIFIER),
            "reference": _sha256(REFERENCE),
            "versions": {name: importlib.metadata.version(name) for name in ("erase-concept", "torch", "numpy")},
        },
    )


def _classify(images: ImageSet) -> Classified:
    from erase_concept.pipelines.emojinette.classifier import load_classifier

    try:
        return classify(images.arrays(), images.rows, load_classifier(CLASSIFIER))
    except ValueError as problem:
        raise RequestError("DIR", folder_of(images), str(problem)) from problem


def _score(name: str, seen: Classified, concept: Concept, settings: Mapping[str, Any], when: str = "") -> Score | None:
    """Return one metric of both models, or None where it does not apply; the protocol also tells of the sampling."""
    function = METRICS[name]
    score = function(seen, concept)
    if score is None:
        return None
    score = replace(score, protocol=f"{when}{score.protocol}; {sampling(settings, seen.rows)}")
    before = None if seen.base is None else function(seen.base, concept)
    return score if before is None else replace(score, baseline=before.value, baseline_ci95=before.ci95)


def _bar(label: str, erased: tuple[int, int], base: tuple[int, int] | None, *, forget: bool) -> Bar:
    """Return a label's accuracy by (images in which it was found, images that asked for it)."""
    baseline, baseline_ci95 = (None, None) if base is None else (base[0] / base[1], wilson(*base))
    return Bar(label, erased[0] / erased[1], wilson(*erased), baseline, baseline_ci95, erased[1], forget)


def _pair(
    place: int, erased: ImageSet, base: ImageSet | None, seen: Classified, seen_base: Classified | None, *, forget: bool
) -> Pair:
    row = erased.rows[place]
    return Pair(
        prompt=row.prompt,
        seed=row.seed,
        forget=forget,
        erased=erased.files[place],
        erased_as=f"{seen.objects[place]}, {seen.styles[place]}",
        base=None if base is None else base.files[place],
        base_as=None if seen_base is None else f"{seen_base.objects[place]}, {seen_base.styles[place]}",
    )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
