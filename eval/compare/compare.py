"""Compare methods and masks on one base model: tune each at equal budget, run the grid, and write what came out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erase_concept.errors import RequestError
from erase_concept.eval.compare.aggregate import Cells, Pooled, dominated, pool
from erase_concept.eval.compare.trials import (
    PRESETS,
    Cell,
    asked_of,
    is_guard,
    read_pairs,
    recipe_of,
    run_cells,
    split_entry,
    split_mask,
)
from erase_concept.eval.compare.tuning import (
    GOAL,
    LEVELS,
    Curve,
    CurveDifference,
    Trial,
    curve,
    curve_difference,
    tune,
)
from erase_concept.eval.report.html import render, sample_sheet
from erase_concept.eval.report.plots import panels
from erase_concept.eval.report.report import Report
from erase_concept.eval.report.write import write_side_by_side
from erase_concept.eval.score import Interval, Score, difference_interval
from erase_concept.files import atomic_write
from erase_concept.recipe import find_concept


def grouped(cells: Cells) -> dict[tuple[str, str | None], list[dict[str, Any]]]:
    """Return the cells by entry and mask, in the order in which they came."""
    groups = defaultdict(list)
    for cell in cells:
        groups[cell["entry"], cell["mask"]].append(cell)
    return dict(groups)


def methods_table(cells: Cells) -> tuple[str, dict[str, Pooled]]:
    """Return a Markdown table of the entries, those that reach ``GOAL`` first and by what they keep, and its rows."""
    pooled = {}
    lost = []
    for (entry, mask), found in grouped(cells).items():
        name = _named(entry, mask)
        one = pool(found)
        if one is None:
            lost.append(name)
        else:
            pooled[name] = one
    erasing = {name: one for name, one in pooled.items() if one.changed}  # a guard takes no time to make
    best = erasing.keys() - dominated(erasing)
    order = sorted(pooled, key=lambda name: (pooled[name].ua >= GOAL, pooled[name].kept), reverse=True)
    lines = [
        "| method | UA | lowest UA | IRA, of base | CRA, of base | Fréchet | seconds | GiB | changed | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in order:
        p = pooled[name]
        told = [f"collapses on {', '.join(p.collapsed)}"] if p.collapsed else []
        told += ["no weights changed"] if p.changed == 0 else []
        told += ["not dominated"] if name in best else []
        row = [
            name,
            f"{p.ua:.1%}{_range(p.ci95['ua'])}",
            f"{p.lowest_ua[1]:.0%} {p.lowest_ua[0]}",
            *(
                f"{p.share[name]:.1%}{_range(p.ci95[name])}, {p.of_base[name]:.1%}" if name in p.share else ""
                for name in ("ira", "cra")
            ),
            "" if p.frechet is None else f"{p.frechet:.2f}",
            f"{p.seconds:.0f}",
            f"{p.peak_gib:.2f}",
            f"{p.changed:.1%}",
            "; ".join(told),
        ]
        lines.append(f"| {' | '.join(row)} |")
    lines += [f"| {name} | failed on every concept | | | | | | | | |" for name in lost]
    return "\n".join(lines), pooled


def beside_table(pooled: dict[str, Pooled], name: str) -> str:
    """Return a Markdown table of how one entry differs from each other one in UA, IRA and CRA, and in time."""
    own = pooled[name]
    lines = [
        f"| {name} less | {' | '.join(metric.upper() for metric in own.share)} | seconds |",
        f"|{'---|' * (len(own.share) + 2)}",
    ]
    for other, theirs in pooled.items():
        if other == name:
            continue
        row = [other]
        for metric, value in own.share.items():
            pair = (theirs.share[metric], theirs.ci95[metric])
            interval = difference_interval(value, own.ci95[metric], *pair)
            differing = [
                value - theirs.by_concept[metric][concept]
                for concept, value in own.by_concept[metric].items()
                if concept in theirs.by_concept[metric]
            ]
            ahead, behind = (sum(sign * d > 0 for d in differing) for sign in (1, -1))
            row.append(f"{100 * (value - pair[0]):+.1f}{_points(interval)}, {ahead}:{behind}")
        row.append(f"{own.seconds:.1f}, {theirs.seconds:.1f}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def curves_table(curves: Sequence[Curve]) -> str:
    """Return a Markdown table of curves: what each keeps at equal UA, and its area."""
    lines = [
        f"| loss | mask | {' | '.join(f'kept at UA {level:.0%}' for level in LEVELS)} | area | strength: UA, kept |",
        "|---|---|---|---|---|---|",
    ]
    for one in curves:
        kept = [
            "not reached" if value is None else f"{value:.1%}" + _range(interval)
            for value, interval in zip(one.at, one.at_ci95, strict=True)
        ]
        points = "; ".join(f"{s:g}: {u:.0%}, {k:.0%}" for s, u, k in one.points)
        lines.append(
            f"| {one.entry} | {one.mask} | {' | '.join(kept)} | {one.area:.3f}{_range(one.area_ci95, '.3f')} "
            f"| {points} |"
        )
    return "\n".join(lines)


def differences_table(differences: Mapping[str, Sequence[CurveDifference]]) -> str:
    """Return a Markdown table, in points, of what more is kept with one mask than with others, by the concepts."""
    lines = [
        f"| concepts | loss | masks | {' | '.join(f'at UA {level:.0%}' for level in LEVELS)} | mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for concepts, found in differences.items():
        for one in found:
            values = zip((*one.at, one.mean), (*one.at_ci95, one.mean_ci95), strict=True)
            row = ["not reached" if value is None else f"{100 * value:+.1f}" + _points(ci) for value, ci in values]
            lines.append(f"| {concepts} | {one.entry} | {one.mask} less {one.other} | {' | '.join(row)} |")
    return "\n".join(lines)


def beside_salient(results: Cells) -> dict[str, list[CurveDifference]]:
    """Return how the salient mask's curve differs from each other mask's, for all concepts and for each kind."""
    kinds = dict.fromkeys(cell["kind"] for cell in results)
    chosen = {"all": results}
    if len(kinds) > 1:
        chosen |= {f"{kind}s": [cell for cell in results if cell["kind"] == kind] for kind in kinds}
    differences = {}
    for name, cells in chosen.items():
        groups = grouped(cells)
        differences[name] = [
            curve_difference(entry, "salient", groups[entry, "salient"], mask, found)
            for (entry, mask), found in groups.items()
            if mask not in (None, "salient") and (entry, "salient") in groups
        ]
    return differences


def _points(interval: Interval | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def _range(interval: Interval | None, form: str = ".1%") -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"


def compare(
    model: str,
    entries: Sequence[str],
    concepts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    masks: Sequence[str | None] = (None,),
    strengths: Sequence[float] = (1.0,),
    tune_on: Sequence[str] = (),
    trials: int = 6,
    benchmark: str = "emojinette",
) -> Iterator[tuple[str, int, int]]:
    """Run a grid of erasures and write ``comparison.md``, ``comparison.json``, and pictures of it.

    Of one strength each that is a page, ``report.html``, and sheets of samples; along strengths ``curves.svg``.

    ``entries`` are methods, the presets "default" and "paper", or either with settings in brackets. With ``tune_on``
    each method's strength is searched first, in as many ``trials`` each, on those concepts with a seed of their own;
    presets are taken as they are. ``strengths`` multiply what was found, and once more by the factor of a mask that has
    one, such as "least-salient@4": weights of little saliency forget as much only at greater strengths. The search is
    kept in ``tuning.json``. Yields (what, cells done, cells in all). Killed at any time, it goes on with the first cell
    that is not in ``out/cells.jsonl``. Raises RequestError, before anything is measured, when an entry, a concept or a
    mask is unknown, or the benchmark, which ``benchmark`` names, cannot tell what became of it.
    """
    from erase_concept.pipelines.load import configs  # torch, which a list of benchmarks does without

    configs(model)
    if overlap := sorted({*concepts} & {*tune_on}):
        raise RequestError("--tune", overlap[0], "is compared on too; tune on other concepts")
    for entry in entries:
        recipe_of(model, Cell(entry, concepts[0], 0))
    for concept in {*concepts, *tune_on}:
        cell = Cell(entries[0], concept, 0)
        asked_of(benchmark, recipe_of(model, cell), cell, out)
    factors = dict(split_mask(mask) for mask in masks)
    best: dict[tuple[str, str | None], float] = {}  # a preset is taken as it is, and a guard has no strength
    searches: dict[str, list[Trial]] = {}
    pairs = list(dict.fromkeys((entry, None if is_guard(entry) else mask) for entry in entries for mask in factors))
    searched = [pair for pair in pairs if not is_guard(pair[0]) and split_entry(pair[0])[0] not in PRESETS]
    for place, (entry, mask) in enumerate(searched if tune_on else ()):
        for found in tune(model, entry, tune_on, trials, out, mask=mask, benchmark=benchmark):
            if isinstance(found, list):
                best[entry, mask] = found[0].strength
                searches[_named(entry, mask)] = found
            else:
                yield f"tuning {_named(entry, mask)}", place, len(searched)
        _write(out / "tuning.json", {name: [asdict(trial) for trial in some] for name, some in searches.items()})
    cells = [
        Cell(entry, concept, seed, mask, best.get((entry, mask), 1.0) * factors.get(mask, 1.0) * strength)
        for seed in seeds
        for concept in concepts
        for entry, mask in pairs
        for strength in ((1.0,) if is_guard(entry) else strengths)
    ]
    results = []
    for cell, result in zip(cells, run_cells(model, cells, out, benchmark), strict=True):
        results.append(result)
        yield cell.name, len(results), len(cells)
    where = model if benchmark == "emojinette" else f"{model}, judged by {Path(benchmark).name}"
    _publish(where, results, searches, concepts, out)


def _named(entry: str, mask: str | None) -> str:
    return entry if mask is None else f"{entry}, mask {mask}"


def _publish(model: str, results: Cells, searches: dict[str, list[Trial]], concepts: Sequence[str], out: Path) -> None:
    """Write the tables, all numbers, and the page with pictures."""
    groups = grouped(results)
    parts = [f"# Methods and masks on {model}", _about(results, concepts)]
    curves: list[Curve] = []
    differences: dict[str, list[CurveDifference]] = {}
    pooled: dict[str, Pooled] = {}
    if any(len({cell["strength"] for cell in cells}) > 1 for cells in groups.values()):
        curves = [curve(entry, mask or "own", cells) for (entry, mask), cells in groups.items()]
        parts += ["## Along the strength", "![What is kept over UA](curves.svg)", curves_table(curves)]
        with atomic_write(out / "curves.svg") as partial:
            partial.write_bytes(render("curves.svg.j2", panels=panels(curves)))
        differences = beside_salient(results)
        if differences["all"]:
            told = (
                "Differences in points of what is kept at equal UA, with 95 % intervals over the concepts and seeds, "
                "both curves resampled together; the mean is over the UA from 0 to 100 % that both reach."
            )
            parts += ["## The salient mask beside each other", told, differences_table(differences)]
    else:
        table, pooled = methods_table(results)
        parts += ["## At the tuned strength" if searches else "## At each method's own strength", table]
        if "default" in pooled and len(pooled) > 1:
            told = (
                "Differences in points, with 95 % intervals (Newcombe) over all images, all taken for independent: "
                "that equal prompts and seeds bind the two makes them rather too wide, that images of one erasure "
                "have much in common rather too narrow. So after them stands in how many concepts the one is "
                "ahead : behind. Seconds of each."
            )
            parts += ["## The default beside each other", told, beside_table(pooled, "default")]
        reports = {name: _report(model, name, one, groups, concepts, out) for name, one in pooled.items()}
        if reports:
            write_side_by_side(reports, out)
        for concept in concepts:
            _write_sheet(model, concept, groups, out)
    if searches:
        parts += ["## The search", _searches_table(searches)]
    with atomic_write(out / "comparison.md") as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    content = {
        "methods": {name: asdict(one) | {"kept": one.kept} for name, one in pooled.items()},
        "curves": [asdict(one) for one in curves],
        "differences": {name: [asdict(one) for one in found] for name, found in differences.items()},
        "tuning": {name: [asdict(trial) for trial in some] for name, some in searches.items()},
    }
    _write(out / "comparison.json", content)


def _about(results: Cells, concepts: Sequence[str]) -> str:
    seeds = sorted({cell["seed"] for cell in results})
    seconds = sum(cell["seconds" if "failed" in cell else "cell_seconds"] for cell in results)
    took = f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
    return (
        f"{len(results)} cells: {', '.join(concepts)}; seeds {', '.join(map(str, seeds))}; {took}. "
        "UA, IRA and CRA with 95 % intervals (Wilson, over all images); of base is the share of the base model's own "
        "from the same prompts and seeds; seconds of erasing and peak memory of the process are medians of the cells, "
        "without what cells share; changed is the share of the UNet's weights that are not the base's any more, or of "
        "the text encoder's where that is its scope. Not dominated: no other is at least as good in UA, IRA and CRA, "
        "better in one, and as quick."
    )


def _searches_table(searches: dict[str, list[Trial]]) -> str:
    lines = ["| method | strength | trials (strength: UA, kept) |", "|---|---|---|"]
    for name, found in searches.items():
        told = "; ".join(
            f"{t.strength:.3g}: {t.ua:.0%}, {t.kept:.0%}" + (" (collapsed)" if t.collapsed else "")
            for t in sorted(found, key=lambda t: t.strength)
        )
        lines.append(f"| {name} | {found[0].strength:.3g} | {told} |")
    return "\n".join(lines)


def _report(
    model: str,
    name: str,
    pooled: Pooled,
    groups: dict[tuple[str, str | None], list[dict[str, Any]]],
    concepts: Sequence[str],
    out: Path,
) -> Report:
    """Return pooled cells as a report, with the images that were kept of them."""
    n = pooled.n["ua"] + max(pooled.n[name] for name in pooled.of_base)
    how = f"Emojinette classifier; {pooled.cells} cells"
    what = ", ".join(concepts)

    def score(metric: str, value: float, interval: Interval, n: int, unit: str, kept: float | None = None) -> Score:
        base = None if not kept else value / kept
        return Score(metric, what, value, n, interval, unit, how, base, None if base is None else (base, base))

    scores = (
        *(
            score(name, value, pooled.ci95[name], pooled.n[name], "fraction", pooled.of_base.get(name))
            for name, value in pooled.share.items()
        ),
        *(() if (far := pooled.frechet) is None else (score("frechet", far, (far, far), n, "distance"),)),
        score("seconds", pooled.seconds, (pooled.seconds, pooled.seconds), pooled.cells, "s"),
        score("peak_gib", pooled.peak_gib, (pooled.peak_gib, pooled.peak_gib), pooled.cells, "GiB"),
        score("changed", pooled.changed, (pooled.changed, pooled.changed), pooled.cells, "fraction"),
    )
    cells = next(cells for key, cells in groups.items() if _named(*key) == name)
    pairs = [pair for cell in cells if "failed" not in cell for pair in read_pairs(out, cell)]
    return Report(what, "object", "", model, "comparison", {}, {}, scores, pairs=tuple(pairs))


def _write_sheet(
    model: str, concept: str, groups: dict[tuple[str, str | None], list[dict[str, Any]]], out: Path
) -> None:
    """Write ``sheets/CONCEPT.png``, what all of the entries make of some prompts, as far as images were kept."""
    rows = {}
    for key, cells in groups.items():
        first = next((cell for cell in cells if cell["concept"] == concept and "failed" not in cell), None)
        if first is not None and first["seed"] == min(cell["seed"] for cell in cells) and read_pairs(out, first):
            rows[_named(*key)] = read_pairs(out, first)
    if rows:
        (out / "sheets").mkdir(exist_ok=True)
        name = find_concept(concept, model).name.replace(" ", "-")
        with atomic_write(out / "sheets" / f"{name}.png") as partial:
            sample_sheet(rows).save(partial, "PNG")


def _write(file: Path, content: Any) -> None:
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
