"""Erase many concepts from Emojinette with the defaults and with the control masks, and hold the results to the bars.

    python benchmarks/erasing.py                                          5 objects and 4 styles, 3 seeds each
    python benchmarks/erasing.py --masks salient none random least-salient --seeds 0               the controls

Every cell (concept, mask, seed) is a run of the ordinary command, in a folder of its own, and its report stays there;
killed and started again, the grid goes on with the first cell that has none. Prints a JSON list of {name, value, unit,
baseline, ratio, bar, holds}, and on stderr a Markdown table, and writes ``erasing.json`` beside the cells. A cell takes
over a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from full_size import row

from erase_concept.eval.benchmark import benchmark
from erase_concept.eval.report import Report, read_report
from erase_concept.eval.score import wilson
from erase_concept.recipe import recipe_for
from erase_concept.run import MASK_KINDS, erase

OBJECTS = ("church", "dog", "gas pump", "guitar", "parachute")
STYLES = ("3d", "flat", "sketch", "pixel")
# Share of the base model's accuracy that must be kept (IRA, CRA) and share that must be gone (UA), by kind of concept.
BARS = {"object": {"ua": 0.99, "ira": 0.985, "cra": 0.99}, "style": {"ua": 0.97, "ira": 0.98, "cra": 0.97}}
# Times each prompt is asked of each cell: 20 forget rows each; 76 retain rows each for an object, 60 for a style.
SEEDS = {"object": 1, "style": 2}
LOWEST_UA = 0.95  # of any single target


def cell(concept: str, mask: str, seed: int, out: Path, preset: str, settings: dict[str, Any]) -> Report:
    """Run one cell, or read its report when it is there."""
    folder = out / f"{concept.replace(' ', '-')}_{mask}_{seed}"
    if (folder / "report.json").is_file():
        return read_report(folder)
    began = time.perf_counter()
    recipe = recipe_for("emojinette", concept, preset_name=preset, mask={"kind": mask}, settings=settings, seed=seed)
    for _ in erase(recipe, folder):
        pass
    base = out / "base" / f"{concept.replace(' ', '-')}_{seed}"
    measured = base if (base / "manifest.jsonl").is_file() else None
    # New noise for every seed, so that no two cells' samples are the same ones.
    asked = {"seeds": SEEDS[recipe.concept.kind], "first_seed": 10_000 + 1_000 * seed}
    *_, report = benchmark(folder, baseline=measured, out=folder, **asked)
    if not base.exists():
        partial = base.with_name(base.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder / "samples" / "base", partial)
        partial.rename(base)
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "pipeline")
    scores = " ".join(f"{score.metric} {score.value:.3f}" for score in report.scores)
    print(
        f"{concept:10} {mask:13} seed {seed}: {scores}  {time.perf_counter() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return report


def summary(cells: list[Report]) -> dict[str, Any]:
    """Pool the cells of one kind of concept and one mask."""
    found: dict[str, Any] = {"cells": len(cells)}
    for metric in ("ua", "ira", "cra", "frechet"):
        scores = [report.score(metric) for report in cells]
        n = sum(score.n for score in scores)
        value, base = (mean(values) for values in zip(*((s.value, s.baseline) for s in scores), strict=True))
        found[metric] = {"value": value, "base": base, "n": n}
        if metric != "frechet":
            found[metric]["ci95"] = wilson(round(sum(score.value * score.n for score in scores)), n)
            found[metric]["kept"] = value / base if base else None
    by_target = defaultdict(list)
    for report in cells:
        by_target[report.concept].append(report.score("ua").value)
    found["lowest_ua"] = min((mean(values), target) for target, values in by_target.items())
    return found


def holds(kind: str, found: dict[str, Any]) -> dict[str, bool]:
    """Hold a summary to the bars of its kind of concept."""
    bars = BARS[kind]
    kept = {metric: found[metric]["kept"] >= bars[metric] for metric in ("ira", "cra")}
    return {"ua": found["ua"]["value"] >= bars["ua"], **kept, "lowest_ua": found["lowest_ua"][0] >= LOWEST_UA}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| erased | mask | UA | lowest UA | IRA, of base | CRA, of base | Fréchet (base) | samples | bars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        kind, mask = name.split("/")
        ua, (low, target) = found["ua"], found["lowest_ua"]
        missed = ", ".join(bar for bar, fine in holds(kind, found).items() if not fine)
        cells = [
            f"{kind}s",
            mask,
            f"{ua['value']:.1%} ({ua['ci95'][0]:.1%} to {ua['ci95'][1]:.1%})",
            f"{low:.0%} {target}",
            *(f"{found[m]['value']:.1%}, {found[m]['kept']:.1%}" for m in ("ira", "cra")),
            f"{found['frechet']['value']:.2f} ({found['frechet']['base']:.2f})",
            f"{ua['n']} + {found['ira']['n']}",
            f"missed: {missed}" if missed else "hold",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results as lines of {name, value, unit, baseline, ratio, bar, holds}."""
    lines = []
    for name, found in results.items():
        bars, held = BARS[name.split("/")[0]], holds(name.split("/")[0], found)
        for metric in ("ua", "ira", "cra"):
            value, base = found[metric]["value"], found[metric]["base"]
            bar = f">= {bars[metric]:g}" + ("" if metric == "ua" else " of the base's")
            line = row(f"{name} {metric}", value, "fraction", base, bar, holds=held[metric])
            lines.append(line | {"ratio": found[metric]["kept"]})  # of a base that is 0, UA has none
    return lines


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/erasing"))
    parser.add_argument("--concepts", nargs="+", default=[*OBJECTS, *STYLES])
    parser.add_argument("--masks", nargs="+", default=["salient"], choices=MASK_KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings; choose another --out")
    args = parser.parse_args()
    settings = {key: yaml.safe_load(value) for key, value in (text.split("=", 1) for text in args.set)}
    groups: dict[str, list[Report]] = defaultdict(list)
    for seed in args.seeds:
        for concept in args.concepts:
            for mask in args.masks:
                report = cell(concept, mask, seed, args.out, args.preset, settings)
                groups[f"{report.kind}/{mask}"].append(report)
    results = {name: summary(cells) for name, cells in sorted(groups.items(), reverse=False)}
    checked = {name: {**found, "holds": holds(name.split("/")[0], found)} for name, found in results.items()}
    (args.out / "erasing.json").write_text(json.dumps(checked, indent=1) + "\n", encoding="utf-8")
    print(table(results), file=sys.stderr)
    print(json.dumps(rows(results), indent=1))


if __name__ == "__main__":
    main()
