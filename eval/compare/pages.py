"""Write a comparison: its tables, its curves, a page with a Pareto plot, and sheets of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erase_concept.eval.compare.aggregate import Aggregate, Share, aggregate, dominated
from erase_concept.eval.compare.comparison import Comparison
from erase_concept.eval.compare.curves import LEVELS, CurveDifference, StrengthCurve
from erase_concept.eval.compare.trials import read_examples
from erase_concept.eval.compare.tuning import GOAL, TuningStep
from erase_concept.eval.report.html import render
from erase_concept.eval.report.image_grid import sample_sheet
from erase_concept.eval.report.plots import HEIGHT, WIDTH, Axis, axis
from erase_concept.eval.report.report import Report
from erase_concept.eval.report.text import title
from erase_concept.eval.report.write import write_side_by_side
from erase_concept.eval.score import Interval, Score, difference_interval
from erase_concept.files import atomic_write

METHODS = (
    "Shares have 95 % intervals (Wilson, over all images). “Of base” is the share of the base model's own value from "
    "the same prompts and seeds. Seconds of erasing and peak memory of the process are medians over the trials, "
    "without what trials share. “Changed” is the share of the UNet's weights that differ from the base model's, or "
    "of the text encoder's where only that is trained. “Not dominated”: no other method forgets and retains as much, "
    "is better in one of these, and is as quick."
)
METHOD_DIFFERENCES = (
    "Differences in points with 95 % intervals (Newcombe) over all images, which are taken as independent. Equal "
    "prompts and seeds make the methods agree more than that, so the intervals are rather too wide; the images of one "
    "erasure have much in common, so they are rather too narrow. The last two numbers count the concepts in which the "
    "method is ahead : behind. Seconds are of each."
)
MASK_DIFFERENCES = (
    "Differences in points of what is retained at equal forgetting, with 95 % intervals over the concepts and seeds. "
    "Both curves are resampled together. The mean is over the forgetting that both reach."
)


def write_pages(comparison: Comparison, folder: Path) -> None:
    """Write comparison.md and comparison.json.

    Along multipliers also curves.svg; otherwise report.html, with report.json and report.md, and sheets of images.
    """
    with atomic_write(folder / "comparison.md") as partial:
        partial.write_text(comparison_markdown(comparison), encoding="utf-8")
    with atomic_write(folder / "comparison.json") as partial:
        content = json.dumps(comparison_json(comparison), indent=1, ensure_ascii=False)
        partial.write_text(content + "\n", encoding="utf-8")
    if comparison.curves:
        write_curves(comparison, folder / "curves.svg")
        return
    if comparison.aggregates:
        reports = {name: method_report(comparison, name, folder) for name in comparison.aggregates}
        write_side_by_side(reports, folder)
    for concept in comparison.concepts:
        _write_sheet(concept, comparison, folder)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return what comparison.json holds."""
    return {
        "methods": {name: asdict(one) | {"retention": one.retention} for name, one in comparison.aggregates.items()},
        "curves": [asdict(one) for one in comparison.curves],
        "differences": {name: [asdict(one) for one in found] for name, found in comparison.differences.items()},
        "tuning": {name: [asdict(step) for step in steps] for name, steps in comparison.tuning.items()},
    }


def write_curves(comparison: Comparison, file: Path) -> None:
    """Draw the curves of a comparison as SVG."""
    with atomic_write(file) as partial:
        partial.write_bytes(render("curves.svg.j2", panels=curve_panels(comparison.curves)))


def comparison_markdown(comparison: Comparison) -> str:
    """Return the tables of a comparison with their captions."""
    parts = [f"# Methods and masks on {comparison.model}", _caption(comparison).strip()]
    if comparison.curves:
        parts += ["## Along the multiplier", "![What is retained over what is forgotten](curves.svg)"]
        parts += [curves_table(comparison.curves)]
        if comparison.differences.get("all"):
            parts += ["## The salient mask and each other mask", MASK_DIFFERENCES]
            parts += [mask_differences_table(comparison.differences)]
    else:
        table = methods_table(comparison.aggregates, comparison.failed)
        parts += ["## At the tuned setting" if comparison.tuning else "## At each method's own setting", table]
        if "default" in comparison.aggregates and len(comparison.aggregates) > 1:
            parts += ["## The default and each other method", METHOD_DIFFERENCES]
            parts += [method_differences_table(comparison.aggregates, "default")]
    if comparison.tuning:
        parts += ["## The tuning", tuning_table(comparison.tuning)]
    return "\n\n".join(parts) + "\n"


def methods_table(aggregates: Mapping[str, Aggregate], failed: Sequence[str] = ()) -> str:
    """Return a Markdown table of methods: first those that reach ``GOAL``, and of these what retains most."""
    erasing = {name: one for name, one in aggregates.items() if one.changed}  # a guard takes no time to make
    best = erasing.keys() - dominated(erasing)
    order = sorted(
        aggregates,
        key=lambda name: (aggregates[name].forgotten.value >= GOAL, aggregates[name].retention),
        reverse=True,
    )
    retained = list(dict.fromkeys(metric for one in aggregates.values() for metric in one.retained))
    distance = next((title(one.distance_metric) for one in aggregates.values() if one.distance_metric), "distance")
    header = ["method", "forgotten", "least forgotten", *(f"{title(metric)}, of base" for metric in retained)]
    header += [distance, "seconds", "GiB", "changed", ""]
    rows = []
    for name in order:
        one = aggregates[name]
        notes = [f"collapses on {', '.join(one.collapsed)}"] if one.collapsed else []
        notes += ["no weights changed"] if one.changed == 0 else []
        notes += ["not dominated"] if name in best else []
        rows.append(
            [
                name,
                _share(one.forgotten),
                f"{one.least_forgotten[1]:.0%} {one.least_forgotten[0]}",
                *(_share(one.retained[metric]) if metric in one.retained else "" for metric in retained),
                "" if one.distance is None else f"{one.distance:.2f}",
                f"{one.seconds:.0f}",
                f"{one.peak_gib:.2f}",
                f"{one.changed:.1%}",
                "; ".join(notes),
            ]
        )
    rows += [[name, "failed on every concept", *[""] * (len(header) - 2)] for name in failed]
    return _table(header, rows)


def method_differences_table(aggregates: Mapping[str, Aggregate], name: str) -> str:
    """Return a Markdown table of how one method differs from each other one in what it forgets, retains and takes."""
    own = aggregates[name]
    rows = []
    for other, theirs in aggregates.items():
        if other != name:
            pairs = [(own.forgotten, theirs.forgotten)]
            pairs += [(share, theirs.retained[metric]) for metric, share in own.retained.items()]
            rows.append([other, *(_difference(*pair) for pair in pairs), f"{own.seconds:.1f}, {theirs.seconds:.1f}"])
    return _table([f"{name} minus", "forgotten", *map(title, own.retained), "seconds"], rows)


def curves_table(curves: Sequence[StrengthCurve]) -> str:
    """Return a Markdown table of curves: what each retains at equal forgetting, and its area."""
    header = ["method", "mask", *(f"retained at {level:.0%} forgotten" for level in LEVELS), "area"]
    rows = [
        [
            one.method,
            one.mask,
            *(
                "not reached" if value is None else f"{value:.1%}" + _range(interval)
                for value, interval in zip(one.at, one.at_ci95, strict=True)
            ),
            f"{one.area:.3f}{_range(one.area_ci95, '.3f')}",
            "; ".join(f"{m:g}: {forgotten:.0%}, {retained:.0%}" for m, forgotten, retained in one.points),
        ]
        for one in curves
    ]
    return _table([*header, "multiplier: forgotten, retained"], rows)


def mask_differences_table(differences: Mapping[str, Sequence[CurveDifference]]) -> str:
    """Return a Markdown table, in points, of what more is retained with one mask than with others, by the concepts."""
    rows = []
    for concepts, found in differences.items():
        for one in found:
            values = zip((*one.at, one.mean), (*one.at_ci95, one.mean_ci95), strict=True)
            row = ["not reached" if value is None else f"{100 * value:+.1f}" + _points(ci) for value, ci in values]
            rows.append([concepts, one.method, f"{one.mask} minus {one.other}", *row])
    return _table(["concepts", "method", "masks", *(f"at {level:.0%} forgotten" for level in LEVELS), "mean"], rows)


def tuning_table(tuning: Mapping[str, Sequence[TuningStep]]) -> str:
    """Return a Markdown table of the multipliers that were tried, with what was found best."""
    rows = []
    for name, steps in tuning.items():
        tried = "; ".join(
            f"{s.multiplier:.3g}: {s.forgotten:.0%}, {s.retained:.0%}" + (" (collapsed)" if s.collapsed else "")
            for s in sorted(steps, key=lambda s: s.multiplier)
        )
        rows.append([name, f"{steps[0].multiplier:.3g}", tried])
    return _table(["method", "multiplier", "tried (multiplier: forgotten, retained)"], rows)


def method_report(comparison: Comparison, name: str, folder: Path) -> Report:
    """Return a method's aggregate as a report, with the images that were kept of its trials."""
    one, results = comparison.aggregates[name], comparison.results_of(name)
    done = [result for result in results if not result.failed]
    concepts = ", ".join(comparison.concepts)
    example = {score.metric: score for result in reversed(done) for score in result.scores}

    def measured(metric: str, value: float, ci95: Interval, n: int) -> Score:
        first = example[metric]
        found = [score for result in done for score in result.scores if score.metric == metric]
        bases = [score.baseline * score.n for score in found if score.baseline is not None]
        base = sum(bases) / n if len(bases) == len(found) else None
        how = f"{one.trials} trials of {concepts}; of {first.target}: {first.protocol}"
        base_ci95 = None if base is None else (base, base)
        return Score(metric, concepts, value, n, ci95, first.unit, how, base, base_ci95)

    gone = one.forgotten
    value, ci95 = (1 - gone.value, (1 - gone.ci95[1], 1 - gone.ci95[0])) if one.flipped else (gone.value, gone.ci95)
    scores = [measured(one.forget_metric, value, ci95, gone.n)]
    scores += [measured(metric, share.value, share.ci95, share.n) for metric, share in one.retained.items()]
    if one.distance is not None:
        first = example[one.distance_metric]
        scores.append(
            _median(one, first.metric, one.distance, first.unit, f"mean of {one.trials} trials; {first.protocol}")
        )
    for metric, unit in (("seconds", "s"), ("peak_gib", "GiB"), ("changed", "fraction")):
        scores.append(_median(one, metric, getattr(one, metric), unit, f"median of {one.trials} trials"))
    kinds = {result.kind for result in results}
    pairs = [pair for result in done for pair in read_examples(folder, result.key)]
    return Report(
        concept=concepts,
        kind=kinds.pop() if len(kinds) == 1 else "concept",
        anchor="",
        model=comparison.model,
        benchmark=comparison.benchmark,
        erased={},
        base={},
        scores=tuple(scores),
        pairs=tuple(pairs),
        provenance={"code": sorted({result.version for result in results})},
    )


@dataclass(frozen=True)
class Panel:
    """The curves of one method. For each mask a line from the base model on, in SVG's points, and dots."""

    title: str
    x: Axis
    y: Axis
    lines: dict[str, str]
    dots: dict[str, list[tuple[float, float]]]


def curve_panels(curves: Sequence[StrengthCurve]) -> list[Panel]:
    """Return a panel for each method, what is retained over what is forgotten, all with the same axes."""
    x = axis([0.0, 1.0], WIDTH)
    y = axis([1.0, *(retained for curve in curves for _, _, retained in curve.points)], HEIGHT, flip=True)
    start = (x.at(0.0), y.at(1.0))
    found = []
    for method in dict.fromkeys(curve.method for curve in curves):
        dots = {c.mask: [(x.at(f), y.at(r)) for _, f, r in c.points] for c in curves if c.method == method}
        lines = {mask: " ".join(f"{a:g},{b:g}" for a, b in (start, *places)) for mask, places in dots.items()}
        found.append(Panel(method, x, y, lines, dots))
    return found


def _caption(comparison: Comparison) -> str:
    results = comparison.results
    seeds = ", ".join(map(str, sorted({result.trial.seed for result in results})))
    seconds = sum(result.trial_seconds for result in results)
    took = f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
    versions = ", ".join(sorted({result.version for result in results}))
    text = (
        f"{len(results)} trials: {', '.join(comparison.concepts)}; seeds {seeds}; {took}; measured with version "
        f"{versions}. "
    )
    if one := aggregate(results):
        retained = " and ".join(f"“{title(metric)}”" for metric in one.retained)
        least = "the smallest of " if len(one.retained) > 1 else ""
        text += f"“Forgotten” is {'100 % less ' if one.flipped else ''}“{title(one.forget_metric)}”. "
        text += f"“Retained” is {least}{retained}, as a share of the base model's own. "
    return text if comparison.curves else text + METHODS


def _write_sheet(concept: str, comparison: Comparison, folder: Path) -> None:
    """Write ``sheets/CONCEPT.png``, what all methods draw for some prompts, as far as images were kept."""
    rows = {}
    for name in comparison.aggregates:
        results = comparison.results_of(name)
        first = next((one for one in results if one.trial.concept == concept and not one.failed), None)
        if first is not None and first.trial.seed == min(one.trial.seed for one in results):
            rows[name] = read_examples(folder, first.key)
    rows = {name: pairs for name, pairs in rows.items() if pairs}
    if rows:
        name = "".join(letter if letter.isalnum() else "-" for letter in Path(concept).stem)
        with atomic_write(folder / "sheets" / f"{name}.png") as partial:
            sample_sheet(rows).save(partial, "PNG")


def _median(one: Aggregate, metric: str, value: float, unit: str, how: str) -> Score:
    return Score(metric, "all trials", value, one.trials, (value, value), unit, how)


def _share(share: Share) -> str:
    of_base = "" if share.of_base is None else f", {share.of_base:.1%}"
    return f"{share.value:.1%}{_range(share.ci95)}{of_base}"


def _difference(ours: Share, theirs: Share) -> str:
    interval = difference_interval(ours.value, ours.ci95, theirs.value, theirs.ci95)
    by_concept = [
        value - theirs.by_concept[concept] for concept, value in ours.by_concept.items() if concept in theirs.by_concept
    ]
    ahead, behind = (sum(sign * difference > 0 for difference in by_concept) for sign in (1, -1))
    return f"{100 * (ours.value - theirs.value):+.1f}{_points(interval)}, {ahead}:{behind}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _points(interval: Interval | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def _range(interval: Interval | None, form: str = ".1%") -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"
