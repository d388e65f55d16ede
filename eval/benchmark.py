"""Named benchmarks: the prompts to ask, the metrics to run, and the base model's scores beside the erased one's."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from erase_concept.errors import RequestError
from erase_concept.eval.accuracy import LABELS, SIZE, Classified, classify, forget_mask, per_concept
from erase_concept.eval.report import Found, Pair, Report, write_report
from erase_concept.eval.score import Score, metrics
from erase_concept.pipelines.emojinette import CLASSIFIER, REFERENCE
from erase_concept.prompts import emojinette
from erase_concept.prompts.concept import Concept, fill, parse
from erase_concept.prompts.concept import concept as find_concept
from erase_concept.prompts.promptset import PromptRow, PromptSet, emojinette_prompts

if TYPE_CHECKING:
    from erase_concept.pipelines.sample import ImageSet

GUIDANCE = 5.0
BENCHMARKS = {
    "emojinette": "one object or style of Emojinette, by classifier: UA, IRA, CRA and the Fréchet distance of the rest"
}
METRICS = metrics()
SHOWN = 8  # pairs of forget images in a report's grid, and twice as many retained ones


def emojinette_benchmark(concept: Concept, seeds: int = 2, first_seed: int = 10_000) -> PromptSet:
    """Return the rows that ask Emojinette for the concept and for everything else, 5.0 the guidance of each.

    Retain rows are every other object (style) in every style (object) once per seed; forget rows are 20 per seed: an
    object in each style and in none, by its label, its synonym and a name the model never learnt; a style with every
    object. Nearly half of the forget sentences are in no training at all, and no prompt is one that the concept is
    erased with. Image seeds run from ``first_seed`` on, without repetition. Raises RequestError for a concept that
    Emojinette does not know and for fewer than one seed.
    """
    _check_known(concept)
    if seeds < 1:
        raise RequestError("--seeds", seeds, "at least 1")
    everything = emojinette_prompts(range(seeds), first_seed=first_seed).rows
    forget = forget_mask(everything, concept)
    rows = [row for row, gone in zip(everything, forget, strict=True) if not gone]
    asked = (
        _object_prompts(concept.name, 20 * seeds) if concept.kind == "object" else _style_prompts(concept.name, seeds)
    )
    rows += [replace(row, seed=first_seed + len(everything) + place) for place, row in enumerate(asked)]
    erased_with = {*concept.forget_prompts, *concept.retain_prompts}
    return PromptSet(
        f"emojinette-{concept.name}",
        tuple(replace(row, guidance=GUIDANCE) for row in rows if row.prompt not in erased_with),
    )


def _object_prompts(label: str, count: int) -> list[PromptRow]:
    """Rows that ask for one object: styles and names take turns, and each style goes through its own sentences."""
    known = emojinette.names_of(label)
    names = (known.label, known.synonym, known.unseen)
    plain = _alternate(emojinette.EVAL_OBJECT, emojinette.UNSEEN_OBJECT)
    styled = _alternate(emojinette.EVAL_STYLED, emojinette.UNSEEN_STYLED)
    rows = []
    for place in range(count):
        turn, s = divmod(place, len(emojinette.STYLES) + 1)
        style = ("", *emojinette.STYLES)[s]
        templates = styled if style else plain
        sentence = templates[turn % len(templates)].replace("{s}", style)
        rows.append(PromptRow(fill(sentence, names[place % len(names)]), 0, object=label, style=style))
    return rows


def _style_prompts(style: str, seeds: int) -> list[PromptRow]:
    """Rows that ask for one style: every object once per seed, by label and synonym in turn."""
    styled = _alternate(emojinette.EVAL_STYLED, emojinette.UNSEEN_STYLED)
    rows = []
    for seed in range(seeds):
        for place, names in enumerate(emojinette.OBJECTS):
            turn = seed + place
            noun = (names.label, names.synonym)[turn // len(styled) % 2]
            sentence = styled[turn % len(styled)].replace("{s}", style)
            rows.append(PromptRow(fill(sentence, noun), 0, object=names.label, style=style))
    return rows


def _alternate(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One of each in turn, then what is left of the longer, so that any few in a row hold both groups."""
    both = [item for pair in zip(first, second, strict=False) for item in pair]
    return [*both, *(item for item in (*first, *second) if item not in both)]


def benchmark(
    model: str | Path,
    concept: str | Concept | None = None,
    baseline: str | Path | None = None,
    *,
    out: Path,
    seeds: int = 2,
    first_seed: int = 10_000,
    batch_size: int = 16,
) -> Iterator[tuple[str, int, int] | Report]:
    """Sample the benchmark from an erased model and its base, judge both, and write the report to ``out``.

    ``model`` is a run folder, anything that ``load`` takes, or a folder of images with their manifest; so is
    ``baseline``, the base model. A run folder knows what was erased, and from what: there both may be None. Yields
    ("erased" or "base", images there, images in all) and last the report. The images stay in ``out/samples``, and
    run again it makes only what is missing. Raises RequestError when the model or the concept cannot be found.
    """
    run: dict[str, Any] = {}
    if (Path(model) / "run.json").is_file():
        run = json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))
        baseline = baseline or run["base"]["source"]
    if concept is None:
        if not run:
            raise RequestError("--concept", "(not given)", f"needed, for {model} is no run folder")
        recipe = yaml.safe_load((Path(model) / "recipe.yaml").read_text(encoding="utf-8"))
        concept = parse(recipe["concept"])
    elif isinstance(concept, str):
        concept = find_concept(concept)
    prompts = emojinette_benchmark(concept, seeds, first_seed)
    erased = yield from _images("erased", model, prompts, out, batch_size)
    base = None
    if baseline is not None:
        base = yield from _images("base", baseline, PromptSet(prompts.name, erased.rows), out, batch_size)
        if run and base.settings.get("unet") != run["base"]["unet"]:
            raise RequestError("--baseline", baseline, "is not the model that this run erased from")
    source = run["base"]["source"] if run else str(baseline or model)
    report = evaluate(concept, erased, base, model=source, provenance={"run": run} if run else None)
    write_report(report, out)
    yield report


def _images(
    who: str, source: str | Path, prompts: PromptSet, out: Path, batch_size: int
) -> Generator[tuple[str, int, int], None, ImageSet]:
    """Read the images when the source is a folder of them, otherwise sample them from the model."""
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.sample import read_images, sample

    folder = Path(source)
    if (folder / "manifest.jsonl").is_file():
        return read_images(folder)
    model = load(source)
    if model.size != SIZE:
        raise RequestError("MODEL", source, f"makes images of {model.size} pixels; this benchmark judges {SIZE}")
    samples, total = out / "samples" / who, len(prompts.rows)
    done = len(list(samples.glob("*.png")))
    yield who, done, total
    for _ in sample(model, prompts, samples, batch_size=batch_size):
        done += 1
        yield who, done, total
    return read_images(samples)


def evaluate(
    concept: Concept,
    erased: ImageSet,
    base: ImageSet | None = None,
    *,
    model: str = "emojinette",
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Run every metric on the erased model's images and, on the same prompts and seeds, on the base model's.

    ``model`` names the base model in the report and ``provenance`` (anything JSON can hold) ends it. Raises
    RequestError when the concept is unknown, when the two sets differ in more than the model, or when there is nothing
    to judge.
    """
    _check_known(concept)
    if base is not None:
        _check_same(erased, base)
    forget = forget_mask(erased.rows, concept)
    if not forget.any() or forget.all():
        missing = "asks for anything else" if forget.any() else f"asks for the {concept.kind} {concept.name!r}"
        raise RequestError("DIR", _folder(erased), f"no image {missing}; sample the benchmark of this concept")
    seen_base = None if base is None else _classify(base)
    seen = replace(_classify(erased), base=seen_base)
    try:
        found_scores = [_score(name, seen, concept, erased.settings) for name in METRICS]
    except ValueError as problem:
        raise RequestError("DIR", _folder(erased), str(problem)) from problem
    found, found_base = per_concept(seen), None if seen_base is None else per_concept(seen_base)
    return Report(
        concept=concept.name,
        kind=concept.kind,
        anchor=concept.anchor,
        model=model,
        benchmark="emojinette",
        erased={"images": len(erased.rows), **erased.settings},
        base=None if base is None else {"images": len(base.rows), **base.settings},
        scores=tuple(score for score in found_scores if score is not None),
        concepts={
            kind: {
                label: Found(found[kind][label], None if found_base is None else found_base[kind][label])
                for label in labels
            }
            for kind, labels in LABELS.items()
        },
        pairs=tuple(
            _pair(place, erased, base, seen, seen_base, forget=bool(forget[place])) for place in _shown(forget)
        ),
        provenance={
            **(provenance or {}),
            "concept": concept.to_dict(),
            "classifier": _sha256(CLASSIFIER),
            "reference": _sha256(REFERENCE),
            "versions": {name: importlib.metadata.version(name) for name in ("erase-concept", "torch", "numpy")},
        },
    )


def _check_known(concept: Concept) -> None:
    known = {"object": emojinette.OBJECT_LABELS, "style": emojinette.STYLES}.get(concept.kind, ())
    if concept.name not in known:
        allowed = ", ".join((*emojinette.OBJECT_LABELS, *emojinette.STYLES))
        raise RequestError(
            "--concept", f"{concept.name!r} ({concept.kind})", f"Emojinette's objects and styles are: {allowed}"
        )


def _check_same(erased: ImageSet, base: ImageSet) -> None:
    """Raise RequestError unless only the models differ: same rows, same sampler, steps and guidance."""
    if erased.rows != base.rows:
        raise RequestError("--baseline", _folder(base), f"its prompts or seeds are not those of {_folder(erased)}")
    for name in ("sampler", "steps", "guidance"):
        ours, theirs = erased.settings.get(name), base.settings.get(name)
        if ours != theirs:
            raise RequestError(
                "--baseline", _folder(base), f"sampled with {name} {theirs}, the erased model with {ours}"
            )


def _classify(images: ImageSet) -> Classified:
    from erase_concept.pipelines.emojinette.classifier import load_classifier

    try:
        return classify(images.arrays(), images.rows, load_classifier(CLASSIFIER))
    except ValueError as problem:
        raise RequestError("DIR", _folder(images), str(problem)) from problem


def _score(name: str, seen: Classified, concept: Concept, settings: Mapping[str, Any]) -> Score | None:
    """Return one metric of both models, or None where it does not apply; the protocol also tells of the sampling."""
    function = METRICS[name]
    score = function(seen, concept)
    if score is None:
        return None
    sampling = f"{settings.get('steps', '?')} steps of {settings.get('sampler', 'an unnamed sampler')}"
    guidance = sorted({row.guidance for row in seen.rows if row.guidance is not None})
    if guidance:
        sampling += f", guidance {', '.join(f'{scale:g}' for scale in guidance)}"
    score = replace(score, protocol=f"{score.protocol}; {sampling}")
    before = None if seen.base is None else function(seen.base, concept)
    return score if before is None else replace(score, baseline=before.value, baseline_ci95=before.ci95)


def _shown(forget: np.ndarray) -> list[int]:
    """Places of the rows for the grid: drawn at random but always the same, forget rows first. No picking."""
    generator = np.random.default_rng(0)
    drawn = (generator.permutation(np.flatnonzero(mask))[:n] for mask, n in ((forget, SHOWN), (~forget, 2 * SHOWN)))
    return [int(place) for places in drawn for place in sorted(places)]


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


def _folder(images: ImageSet) -> Path | str:
    return images.files[0].parent if images.files else "(empty)"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
